//! Durations as fleet.conf and the API write them: Go's form, `30s`, `1m30s`, `1.5h`.
//!
//! The rules and the error texts are those of Go's `time.ParseDuration`, since old configuration files and the
//! people who read the errors know them. Negative durations are refused: nothing in fleet means one.
use std::time::Duration;

/// Why a text is no duration; the texts are Go's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DurationError {
    /// It has another form, or is longer than Go's durations can be (about 292 years).
    #[error("time: invalid duration {0:?}")]
    Invalid(String),
    /// A number without a unit.
    #[error("time: missing unit in duration {0:?}")]
    MissingUnit(String),
    /// A unit that is none of ns, us, µs, ms, s, m, h: the unit, then the whole text.
    #[error("time: unknown unit {0:?} in duration {1:?}")]
    UnknownUnit(String, String),
    /// Less than nothing.
    #[error("negative duration {0:?}")]
    Negative(String),
}

/// Longer texts are no durations; it also bounds what an error repeats.
const MAX_TEXT: usize = 128;

const NANOSECOND: u128 = 1;
const MICROSECOND: u128 = 1_000;
const MILLISECOND: u128 = 1_000_000;
const SECOND: u128 = 1_000_000_000;
const MINUTE: u128 = 60 * SECOND;
const HOUR: u128 = 60 * MINUTE;

/// Reads a duration; fractions of a nanosecond are cut off.
pub fn parse(text: &str) -> Result<Duration, DurationError> {
    if text.len() > MAX_TEXT {
        return Err(DurationError::Invalid(format!(
            "{}...",
            text.chars().take(MAX_TEXT).collect::<String>()
        )));
    }
    let invalid = || DurationError::Invalid(text.to_owned());
    let (negative, mut rest) = match text.as_bytes().first() {
        Some(b'-') => (true, &text[1..]),
        Some(b'+') => (false, &text[1..]),
        _ => (false, text),
    };
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    if rest.is_empty() {
        return Err(invalid());
    }
    let mut total: u128 = 0;
    while !rest.is_empty() {
        let (whole, after) = digits(rest);
        let (fraction, after) = match after.strip_prefix('.') {
            Some(after) => digits(after),
            None => ("", after),
        };
        if whole.is_empty() && fraction.is_empty() {
            return Err(invalid());
        }
        let end = after.find(|c: char| c == '.' || c.is_ascii_digit()).unwrap_or(after.len());
        let (unit, after) = after.split_at(end);
        let nanoseconds = match unit {
            "" => return Err(DurationError::MissingUnit(text.to_owned())),
            "ns" => NANOSECOND,
            // Both the micro sign and the Greek letter are in use.
            "us" | "\u{b5}s" | "\u{3bc}s" => MICROSECOND,
            "ms" => MILLISECOND,
            "s" => SECOND,
            "m" => MINUTE,
            "h" => HOUR,
            _ => return Err(DurationError::UnknownUnit(unit.to_owned(), text.to_owned())),
        };
        total += scaled(whole, fraction, nanoseconds).ok_or_else(invalid)?;
        if total > i64::MAX as u128 {
            return Err(invalid());
        }
        rest = after;
    }
    if negative && total > 0 {
        return Err(DurationError::Negative(text.to_owned()));
    }
    u64::try_from(total).map(Duration::from_nanos).map_err(|_| invalid())
}

/// The leading decimal digits, and what follows them.
fn digits(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

/// `whole.fraction` times a unit of so many nanoseconds; nothing when it is too much.
fn scaled(whole: &str, fraction: &str, unit: u128) -> Option<u128> {
    let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let (mut numerator, mut denominator) = (0_u128, 1_u128);
    // An hour has 13 digits of nanoseconds: later digits of a fraction are worth less than one.
    for digit in fraction.bytes().take(20) {
        numerator = numerator * 10 + u128::from(digit - b'0');
        denominator *= 10;
    }
    whole.checked_mul(unit)?.checked_add(numerator.checked_mul(unit)? / denominator)
}

/// Writes a duration as Go does: `1h30m0s`, `1.5s`, `250ms`, `0s`.
pub fn format(duration: Duration) -> String {
    let nanoseconds = duration.as_nanos();
    match nanoseconds {
        0 => "0s".to_owned(),
        n if n < MICROSECOND => format!("{n}ns"),
        n if n < MILLISECOND => format!("{}\u{b5}s", decimal(n, MICROSECOND)),
        n if n < SECOND => format!("{}ms", decimal(n, MILLISECOND)),
        n => {
            let seconds = decimal(n % MINUTE, SECOND);
            match (n / HOUR, n % HOUR / MINUTE) {
                (0, 0) => format!("{seconds}s"),
                (0, minutes) => format!("{minutes}m{seconds}s"),
                (hours, minutes) => format!("{hours}h{minutes}m{seconds}s"),
            }
        }
    }
}

/// `value / unit` in decimal, without zeros at the end; `unit` is a power of ten.
fn decimal(value: u128, unit: u128) -> String {
    let (whole, fraction) = (value / unit, value % unit);
    if fraction == 0 {
        return whole.to_string();
    }
    let width = unit.ilog10() as usize;
    let digits = format!("{fraction:0width$}");
    format!("{whole}.{}", digits.trim_end_matches('0'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_what_go_reads() {
        for (text, nanoseconds) in [
            ("0", 0),
            ("0s", 0),
            ("-0s", 0),
            ("30s", 30 * SECOND),
            ("+5s", 5 * SECOND),
            ("1m30s", 90 * SECOND),
            ("1.5h", 90 * MINUTE),
            (".5s", SECOND / 2),
            ("5.s", 5 * SECOND),
            ("3h2m1s", 3 * HOUR + 2 * MINUTE + SECOND),
            ("1s1h", HOUR + SECOND),
            ("10ms", 10 * MILLISECOND),
            ("12us", 12 * MICROSECOND),
            ("12\u{b5}s", 12 * MICROSECOND),
            ("12\u{3bc}s", 12 * MICROSECOND),
            ("7ns", 7),
            ("0.9999999999999999999999999s", SECOND - 1),
            ("9223372036854775807ns", i64::MAX as u128),
        ] {
            assert_eq!(parse(text).unwrap().as_nanos(), nanoseconds, "{text}");
        }
    }

    #[test]
    fn refuses_in_gos_words() {
        for (text, error) in [
            ("30", "time: missing unit in duration \"30\""),
            ("1m30", "time: missing unit in duration \"1m30\""),
            ("", "time: invalid duration \"\""),
            ("-", "time: invalid duration \"-\""),
            (".", "time: invalid duration \".\""),
            (".s", "time: invalid duration \".s\""),
            ("s", "time: invalid duration \"s\""),
            ("thirty", "time: invalid duration \"thirty\""),
            ("1d", "time: unknown unit \"d\" in duration \"1d\""),
            ("30 s", "time: unknown unit \" s\" in duration \"30 s\""),
            ("1s-1s", "time: unknown unit \"s-\" in duration \"1s-1s\""),
            ("9223372036854775808ns", "time: invalid duration \"9223372036854775808ns\""),
            ("99999999999999999999999999999999999999999h", ""),
            ("-1s", "negative duration \"-1s\""),
        ] {
            let got = parse(text).unwrap_err().to_string();
            if error.is_empty() {
                assert!(got.starts_with("time: invalid duration"), "{got}");
            } else {
                assert_eq!(got, error);
            }
        }
        assert!(parse(&"1h".repeat(100_000)).unwrap_err().to_string().len() < 200);
    }

    #[test]
    fn writes_as_go_does() {
        for (nanoseconds, text) in [
            (0, "0s"),
            (1, "1ns"),
            (1_100, "1.1\u{b5}s"),
            (2_200_000, "2.2ms"),
            (3_300_000_000, "3.3s"),
            (60 * SECOND as u64, "1m0s"),
            (90 * SECOND as u64, "1m30s"),
            (HOUR as u64, "1h0m0s"),
            ((4 * HOUR + 5 * MINUTE + 6 * SECOND + MILLISECOND) as u64, "4h5m6.001s"),
        ] {
            assert_eq!(format(Duration::from_nanos(nanoseconds)), text);
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(nanoseconds in prop_oneof![0..=i64::MAX as u64, 0..10_000_000_000_u64]) {
            let duration = Duration::from_nanos(nanoseconds);
            prop_assert_eq!(parse(&format(duration)), Ok(duration));
        }

        #[test]
        fn any_text_is_read_or_refused(text in "[-+0-9.a-z\u{b5} ]{0,40}|\\PC{0,40}") {
            if let Ok(duration) = parse(&text) {
                prop_assert_eq!(parse(&format(duration)), Ok(duration));
            }
        }
    }
}
