//! Many changes of units at once: in few requests where the server takes them so, else in one for each.

use super::call::Call;
use super::{AT_ONCE, Client, Error, options_of_file, unit_path};
use crate::types::{MOST_CHANGES, Unit, UnitChange, UnitChangeList, UnitChangeOutcome, UnitChangeOutcomes};
use fleet_unit::UnitFile;
use futures_util::{StreamExt, stream as futures};
use http::Method;
use std::sync::atomic::Ordering;

/// The most of unit files in one request, bytes: escaped they fit into what a server takes.
const LARGEST: usize = 3 << 20;

impl Client {
    /// Makes changes of units, and tells of each, in their order, what [`put_unit`](Self::put_unit) or
    /// [`delete_unit`](Self::delete_unit) would: whether it was created or replaced, or whether there was something to destroy.
    ///
    /// With one change, and with servers that know no better, these are what is asked for: the original's, too.
    pub async fn change_units(&self, changes: &[UnitChange]) -> Vec<Result<bool, Error>> {
        let mut outcomes = Vec::with_capacity(changes.len());
        while let Some(rest) = changes.get(outcomes.len()..).filter(|rest| rest.len() > 1) {
            let part = rest.get(..fitting(rest)).unwrap_or(rest);
            match self.change_together(part).await {
                Ok(Some(more)) => outcomes.extend(more),
                Ok(None) => break,
                Err(error) => outcomes.extend(part.iter().map(|change| Err(self.of_one(&error, change)))),
            }
        }
        let rest = changes.get(outcomes.len()..).unwrap_or_default();
        let mut singles = futures::iter(rest.iter().map(|change| self.change_one(change))).buffered(AT_ONCE);
        while let Some(outcome) = singles.next().await {
            outcomes.push(outcome);
        }
        outcomes
    }

    /// Makes changes with one request; `None` when the server knows no such request.
    async fn change_together(
        &self,
        changes: &[UnitChange],
    ) -> Result<Option<Vec<Result<bool, Error>>>, Error> {
        let list = UnitChangeList { changes: changes.to_vec() };
        let body = serde_json::to_vec(&list).unwrap_or_default();
        // Each says what is to be: twice is as good as once.
        let call = Call {
            method: Method::POST,
            body: Some(body.into()),
            idempotent: true,
            ..Call::get("unit-changes")
        };
        let target = self.target(&call);
        let answer = match self.ask_whole(&call).await {
            Err(error) if error.is_unknown_resource() => return Ok(None),
            answer => answer?,
        };
        let strange = |reason: String| target.malformed(reason);
        let UnitChangeOutcomes { outcomes } = serde_json::from_slice(&answer.body)
            .map_err(|error| strange(format!("the answer is not understood: {error}")))?;
        if outcomes.len() != changes.len() {
            let reason = format!("{} outcomes of {} changes", outcomes.len(), changes.len());
            return Err(strange(reason));
        }
        let again = call.again.load(Ordering::Relaxed);
        let pairs = changes.iter().zip(outcomes);
        Ok(Some(pairs.map(|(change, outcome)| read(change, outcome, again)).collect()))
    }

    async fn change_one(&self, change: &UnitChange) -> Result<bool, Error> {
        if change.destroy {
            return self.delete_unit(&change.name).await;
        }
        let UnitChange { name, desired_state, file, .. } = change.clone();
        // For servers that know no texts.
        let options = UnitFile::parse(&file).map(|file| options_of_file(&file)).unwrap_or_default();
        self.put_unit(&Unit { name, desired_state, file, options, ..Unit::default() }).await
    }

    /// Why a request of many was not answered, as that for one of them would be told.
    fn of_one(&self, error: &Error, change: &UnitChange) -> Error {
        let Error::NoAnswer { reason, .. } = error else { return error.clone() };
        let method = if change.destroy { Method::DELETE } else { Method::PUT };
        let call = Call { method, ..Call::get(unit_path(&change.name, "")) };
        self.target(&call).no_answer(reason.clone())
    }
}

/// How many of the first changes go into one request, at least one.
fn fitting(changes: &[UnitChange]) -> usize {
    let mut bytes = 0;
    let fits = changes.iter().take(MOST_CHANGES).take_while(|change| {
        bytes += change.file.len();
        bytes <= LARGEST
    });
    fits.count().max(1)
}

/// `again`: the request may have been carried out before.
fn read(change: &UnitChange, outcome: UnitChangeOutcome, again: bool) -> Result<bool, Error> {
    match outcome.code {
        404 if change.destroy => Ok(again),
        code @ 200..=299 => Ok(change.destroy || code == 201),
        code => Err(Error::Refused { code, message: outcome.message, exit_code: None }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_bounded_in_number_and_size() {
        let of = |size: usize| UnitChange { file: "x".repeat(size), ..UnitChange::default() };
        assert_eq!(fitting(&vec![of(0); 2500]), MOST_CHANGES);
        assert_eq!(fitting(&[of(LARGEST), of(1)]), 1);
        assert_eq!(fitting(&[of(LARGEST + 1), of(1)]), 1);
        assert_eq!(fitting(&[of(LARGEST / 2), of(LARGEST / 2), of(1)]), 2);
    }

    #[test]
    fn what_is_gone_was_destroyed_by_the_same_request_before() {
        let destroy = UnitChange { destroy: true, ..UnitChange::default() };
        let gone = || UnitChangeOutcome { code: 404, message: "unit does not exist".into() };
        assert_eq!(read(&destroy, gone(), false), Ok(false));
        assert_eq!(read(&destroy, gone(), true), Ok(true));
        let refused = read(&UnitChange::default(), gone(), false).expect_err("refused");
        assert_eq!(refused.to_string(), "googleapi: Error 404: unit does not exist");
        let code = |code| UnitChangeOutcome { code, message: String::new() };
        assert_eq!(read(&UnitChange::default(), code(201), false), Ok(true));
        assert_eq!(read(&UnitChange::default(), code(204), false), Ok(false));
        assert_eq!(read(&destroy, code(204), false), Ok(true));
    }
}
