//! Points in time as tables show them, in UTC.
use jiff::Timestamp;

const MINUTE: i64 = 60;
const HOUR: i64 = 60 * MINUTE;
const DAY: i64 = 24 * HOUR;

/// Now, in seconds since 1970.
pub(crate) fn now() -> i64 {
    Timestamp::now().as_second()
}

/// `2026-11-22 14:33 UTC`, from seconds since 1970. A number beyond all calendars is shown as it is.
pub(crate) fn date(seconds: i64) -> String {
    match Timestamp::from_second(seconds) {
        Ok(time) => time.strftime("%Y-%m-%d %H:%M UTC").to_string(),
        Err(_) => seconds.to_string(),
    }
}

/// The date and how far away it is: `2026-11-22 14:33 UTC (in 23h)`, `… (expired)`.
pub(crate) fn expiry(seconds: i64, now: i64) -> String {
    let away = match seconds.saturating_sub(now) {
        ..=0 => "expired".to_owned(),
        left if left < MINUTE => format!("in {left}s"),
        left if left < HOUR => format!("in {}m", left / MINUTE),
        left if left < 2 * DAY => format!("in {}h", left / HOUR),
        left => format!("in {}d", left / DAY),
    };
    format!("{} ({away})", date(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(date(0), "1970-01-01 00:00 UTC");
        assert_eq!(date(1_795_300_000), "2026-11-21 22:26 UTC");
        assert_eq!(date(-1), "1969-12-31 23:59 UTC");
        assert_eq!(date(i64::MAX), i64::MAX.to_string());
    }

    #[test]
    fn expiries() {
        let away = |left: i64| {
            let text = expiry(1_795_300_000, 1_795_300_000 - left);
            text.strip_prefix("2026-11-21 22:26 UTC ").unwrap().to_owned()
        };
        for (left, text) in [
            (-5, "(expired)"),
            (0, "(expired)"),
            (59, "(in 59s)"),
            (HOUR - 1, "(in 59m)"),
            (DAY, "(in 24h)"),
            (2 * DAY - 1, "(in 47h)"),
            (2 * DAY, "(in 2d)"),
        ] {
            assert_eq!(away(left), text);
        }
        assert!(expiry(i64::MAX, i64::MIN).contains("(in "));
    }
}
