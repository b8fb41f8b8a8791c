//! join-token: the tokens with which machines join the cluster.
use super::list::print_table;
use crate::cli::{CreateJoinToken, JoinToken, ListJoinTokens};
use crate::context::{Context, misused, print_json, print_line};
use crate::dates;
use anyhow::Result;
use fleet_api::client::Error;
use fleet_api::types::{self, JoinTokenRequest};
use serde_json::json;
use std::io::IsTerminal;

const COLUMNS: [&str; 4] = ["id", "created", "expires", "uses"];

pub(crate) async fn run(context: &Context, command: JoinToken) -> Result<i32> {
    match command {
        JoinToken::Create(args) => create(context, args).await,
        JoinToken::List(args) => list(context, &args).await,
        JoinToken::Revoke(args) => revoke(context, &args.ids).await,
    }
}

async fn create(context: &Context, args: CreateJoinToken) -> Result<i32> {
    let request = JoinTokenRequest { ttl: args.ttl, uses: args.uses };
    let token = match context.client.create_join_token(&request).await {
        Ok(token) => token,
        Err(error) => return Ok(fail(context, "Error creating join token: ", &error)),
    };
    if context.json() {
        print_json(&token)?;
        return Ok(0);
    }
    print_line(&token.token)?;
    // A script that takes the token does not need to be told what it is for.
    if std::io::stdout().is_terminal() && std::io::stderr().is_terminal() {
        let uses = match token.uses_left {
            None => "any number of machines".to_owned(),
            Some(1) => "one machine".to_owned(),
            Some(n) => format!("{n} machines"),
        };
        eprintln!("Good for {uses} until {}. On the machine that is to join:", dates::date(token.expires));
        eprintln!("  fleetd --set join=ADDRESS:4919 --set join_token=TOKEN");
        eprintln!("or join and join_token in its /etc/fleet/fleet.conf; ADDRESS is that of a server.");
    }
    Ok(0)
}

async fn list(context: &Context, args: &ListJoinTokens) -> Result<i32> {
    let mut tokens = match context.client.join_tokens().await {
        Ok(tokens) => tokens,
        Err(error) => return Ok(fail(context, "Error retrieving list of join tokens: ", &error)),
    };
    tokens.sort_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id)));
    if context.json() {
        print_json(&tokens)?;
        return Ok(0);
    }
    let now = dates::now();
    print_table(&COLUMNS, tokens.iter().map(|token| row(token, now)), args.no_legend)?;
    Ok(0)
}

/// A line of the table.
fn row(token: &types::JoinToken, now: i64) -> Vec<String> {
    let uses = match token.uses_left {
        None => "unlimited".to_owned(),
        Some(0) => "used up".to_owned(),
        Some(n) => format!("{n} left"),
    };
    vec![token.id.clone(), dates::date(token.created), dates::expiry(token.expires, now), uses]
}

async fn revoke(context: &Context, ids: &[String]) -> Result<i32> {
    if ids.is_empty() {
        return misused("No join tokens given");
    }
    let mut code = 0;
    for id in ids {
        match context.client.delete_join_token(id).await {
            Ok(true) if context.json() => context.remember(json!({"id": id, "revoked": true})),
            Ok(true) => print_line(&format!("Revoked join token {id}"))?,
            Ok(false) => {
                eprintln!("Join token {id} does not exist.");
                code = 1;
            }
            Err(error) => code = fail(context, &format!("Error revoking join token {id}: "), &error),
        }
    }
    context.finish()?;
    Ok(code)
}

fn fail(context: &Context, before: &str, error: &Error) -> i32 {
    context.fail_at(before, error, "join tokens")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows() {
        let token = |uses_left| types::JoinToken {
            id: "a1".into(),
            created: 1_795_200_000,
            expires: 1_795_300_000,
            uses_left,
        };
        let row = |uses_left| row(&token(uses_left), 1_795_290_000).join("|");
        assert_eq!(row(Some(3)), "a1|2026-11-20 18:40 UTC|2026-11-21 22:26 UTC (in 2h)|3 left");
        assert!(row(Some(0)).ends_with("|used up"));
        assert!(row(None).ends_with("|unlimited"));
    }
}
