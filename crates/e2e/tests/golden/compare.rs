//! What may differ between two runs without being a difference: times, process numbers, addresses, versions, ports.

use crate::transcript::Answer;
use regex::Regex;
use std::sync::LazyLock;

static RULES: LazyLock<Vec<(Regex, &str)>> = LazyLock::new(|| {
    [
        // The cluster's network and the names of its hosts.
        (r"172\.30\.\d\.", "172.30.7."),
        (r"172\.30\.7\.1:2379", "172.30.7.1:22379"),
        (r"golden-\d+-\d+-(\d)", "gold-$1"),
        (r"(fleetd/|fleetctl version |fleetd version )[0-9][0-9A-Za-z.+-]*", "$1<VERSION>"),
        (r#"(fleet_build_info\{version=")[^"]*"#, "$1<VERSION>"),
        // Times.
        (r"(?m)^Date: .*$", "Date: <HTTPDATE>"),
        (r"since \w{3} \d{4}-\d\d-\d\d .*? ago", "since <DATE>; <AGO> ago"),
        (
            r"(?m)^((?:[0-9a-f]{8} \S+)? *)\w{3} \d\d \d\d:\d\d:\d\d (gold-\d) ([^\[\s]+)\[\d+\]:",
            "$1<JTIME> $2 $3[<PID>]:",
        ),
        // A unit that says so every second: how often depends on when one looks; and it may be faster than systemd's own line.
        (
            r"(<JTIME> gold-1 bash\[<PID>\]: Hello, world\n)(<JTIME> gold-1 systemd\[<PID>\]: Started [^\n]*\n)",
            "$2$1",
        ),
        (r"(<JTIME> gold-1 bash\[<PID>\]: Hello, world\n)+", "$1"),
        (r"(?m)^(   Duration): .*$", "$1: <TIME>"),
        (r"start_time=\[[^\]]*\]", "start_time=[<TIME>]"),
        // What the original's log put before a message: the time, and where in its source.
        (r"(?m)^(<TIME>|\d{4}/\d\d/\d\d \d\d:\d\d:\d\d) (DEBUG|INFO|WARN|ERROR) [\w.]+:\d+: ", ""),
        // Processes.
        (r"(Main PID|Process): \d+", "$1: <PID>"),
        (r"pid=\d+", "pid=<PID>"),
        (r"([├└]─)\d+ ", "$1<PID> "),
        // Fingerprints of host keys, made anew every time.
        (r"([0-9a-f]{2}:){15}[0-9a-f]{2}", "<MD5FP>"),
        (r"SHA256:[A-Za-z0-9+/]{43}", "<FINGERPRINT>"),
        // Which machine a unit of several gets depends on the order in which they arrive.
        (r"[0-9a-f]{8}\.\.\./172\.30\.7\.1[123]", "<MACHINE>"),
        (r"[0-9a-f]{32}/172\.30\.7\.1[123]", "<MACHINE IN FULL>"),
        // Values of metrics.
        (r"(?m)^((?:fleet|go|http|process)_[a-z_]+(?:\{.*\})?) -?[0-9][0-9.e+-]*$", "$1 <N>"),
        // What we say in our own words.
        (r#""description": ".*""#, "\"description\": \"<in our own words>\""),
        (
            r"(?s)^(.*\n\nUsage: |NAME:\n.*\n\nUSAGE:\n\t)fleetctl .*$",
            "<help text of the command; ours says it in its own words>",
        ),
    ]
    .map(|(pattern, with)| (Regex::new(pattern).expect("a pattern of this file"), with))
    .into()
});

/// Replaces what changes from run to run by marks.
fn normal(text: &str) -> String {
    let mut text = text.trim_end_matches('\n').to_owned();
    for (pattern, with) in &*RULES {
        text = pattern.replace_all(&text, *with).into_owned();
    }
    text
}

/// A response of `curl -i`: the status line, the headers in the order of their names, the body. Content-Length must be
/// right; how long it is follows from the body.
fn response(text: &str) -> Option<String> {
    let text = text.replace("\r\n", "\n");
    if !text.starts_with("HTTP/1.") {
        return None;
    }
    let (head, body) = text.split_once("\n\n").unwrap_or((text.trim_end(), ""));
    let mut lines = head.lines();
    let status = lines.next().unwrap_or_default();
    // What is only added is no difference.
    let added = |line: &str| {
        ["fleet-", "transfer-encoding", "content-length"].iter().any(|name| line.starts_with(name))
    };
    let mut headers: Vec<String> = lines
        .filter(|line| !added(&line.to_ascii_lowercase()))
        .map(|line| match line.split_once(':') {
            Some((name, value)) => format!("{}:{value}", titled(name)),
            None => line.to_owned(),
        })
        .collect();
    headers.sort();
    Some(format!("{status}\n{}\n\n{body}", headers.join("\n")))
}

/// `content-type` as `Content-Type`: names of headers have no case.
fn titled(name: &str) -> String {
    let word = |word: &str| match word.split_at_checked(1) {
        Some((first, rest)) => first.to_ascii_uppercase() + &rest.to_ascii_lowercase(),
        None => String::new(),
    };
    name.split('-').map(word).collect::<Vec<_>>().join("-")
}

/// Whether an answer is the one expected. A line `<...>` of that stands for any lines: for what depends on how far a machine has got.
pub(crate) fn same(expected: &Answer, answer: &Answer) -> bool {
    expected.exit == answer.exit
        && any_lines(&expected.stdout, &answer.stdout)
        && any_lines(&expected.stderr, &answer.stderr)
}

fn any_lines(expected: &str, text: &str) -> bool {
    fn lines(expected: &[&str], text: &[&str]) -> bool {
        match expected {
            [] => text.is_empty(),
            ["<...>", rest @ ..] => (0..=text.len()).any(|from| lines(rest, &text[from..])),
            [first, rest @ ..] => text.first() == Some(first) && lines(rest, &text[1..]),
        }
    }
    lines(&expected.lines().collect::<Vec<_>>(), &text.lines().collect::<Vec<_>>())
}

/// An answer without what changes from run to run.
pub(crate) fn normalised(answer: &Answer) -> Answer {
    let stdout = response(&answer.stdout).unwrap_or_else(|| answer.stdout.clone());
    Answer { stdout: normal(&stdout), stderr: normal(&answer.stderr), exit: answer.exit }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_changes_is_replaced() {
        for (text, expected) in [
            ("Unit a loaded on 4a1e0c2f.../172.30.9.11\n", "Unit a loaded on <MACHINE>"),
            ("4a1e0c2f...\t172.30.9.11\t-", "4a1e0c2f...\t172.30.7.11\t-"),
            ("Nov 22 12:00:01 golden-17-3-1 bash[12]: line 3", "<JTIME> gold-1 bash[<PID>]: line 3"),
            ("<TIME> INFO restart.go:82: Unit(a) x", "Unit(a) x"),
            ("fleet_x_total{type=\"a\"} 3.5e+09", "fleet_x_total{type=\"a\"} <N>"),
            ("exit 300", "exit 300"),
            (
                "<JTIME> gold-1 bash[<PID>]: Hello, world\n<JTIME> gold-1 systemd[<PID>]: Started a\n\
                 <JTIME> gold-1 bash[<PID>]: Hello, world\nx",
                "<JTIME> gold-1 systemd[<PID>]: Started a\n<JTIME> gold-1 bash[<PID>]: Hello, world\nx",
            ),
        ] {
            assert_eq!(normal(text), expected);
        }
    }

    #[test]
    fn some_lines_may_be_anything() {
        assert!(
            any_lines("a\n<...>\nb", "a\nb")
                && any_lines("a\n<...>\nb", "a\nx\ny\nb")
                && any_lines("<...>", "")
        );
        assert!(!any_lines("a\n<...>\nb", "a\nb\nc") && !any_lines("a", "a\nb") && !any_lines("a\nb", "a"));
    }

    #[test]
    fn responses_are_compared_by_what_they_say() {
        let ours = "HTTP/1.1 200 OK\r\ndate: now\r\ncontent-type: a\r\nfleet-revision: 5\r\ncontent-length: 2\r\n\r\n{}";
        let recorded = "HTTP/1.1 200 OK\nContent-Type: a\nDate: <HTTPDATE>\nContent-Length: 2\n\n{}";
        assert_eq!(response(ours).map(|t| normal(&t)), response(recorded).map(|t| normal(&t)));
        assert_eq!(response("{}"), None);
    }
}
