//! Values of flags as Go writes them, and what it says of those that are none.
use std::time::Duration;

/// A boolean by Go's `strconv.ParseBool`.
pub(crate) fn boolean(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// Why a text is no boolean, as `strconv.ParseBool` says it.
pub(crate) fn no_boolean(text: &str) -> String {
    format!("strconv.ParseBool: parsing {text:?}: invalid syntax")
}

/// Why a text is no whole number, as `strconv.ParseInt` says it.
pub(crate) fn no_integer(text: &str, error: &std::num::ParseIntError) -> String {
    use std::num::IntErrorKind::{NegOverflow, PosOverflow};
    let reason = match error.kind() {
        PosOverflow | NegOverflow => "value out of range",
        _ => "invalid syntax",
    };
    format!("strconv.ParseInt: parsing {text:?}: {reason}")
}

/// A decimal number, or why it is none, as `strconv.ParseFloat` says it.
pub(crate) fn decimal(text: &str) -> Result<f64, String> {
    text.parse().map_err(|_| format!("strconv.ParseFloat: parsing {text:?}: invalid syntax"))
}

/// A duration by Go's `time.ParseDuration` (`1h2m3.5s`), or a plain number of seconds.
pub(crate) fn duration(text: &str) -> Option<Duration> {
    if let Ok(seconds) = text.parse::<f64>() {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    fleet_api::duration::parse(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn booleans() {
        assert_eq!(boolean("T"), Some(true));
        assert_eq!(boolean("False"), Some(false));
        assert_eq!(["yes", "tRUE", "", "maybe"].map(boolean), [None; 4]);
    }

    #[test]
    fn durations() {
        assert_eq!(duration("1h2m3.5s"), Some(Duration::from_millis(3_723_500)));
        assert_eq!(duration("250ms"), Some(Duration::from_millis(250)));
        assert_eq!(duration("0"), Some(Duration::ZERO));
        assert_eq!(duration("1.5"), Some(Duration::from_millis(1500)));
        for bad in ["", "s", "5x", "1.2.3s", "-1s", "-1", "1m2", "inf", "NaN", "99999999999999999999h"] {
            assert_eq!(duration(bad), None, "{bad}");
        }
    }
}
