//! Object paths of units and jobs.
const UNITS: &str = "/org/freedesktop/systemd1/unit/";
const JOBS: &str = "/org/freedesktop/systemd1/job/";

/// The name of the unit with this object path. systemd writes every byte but ASCII letters and digits (and a
/// digit in first place) as `_` and two hexadecimal digits, and the empty name as `_`.
pub(super) fn unit_name(path: &str) -> Option<String> {
    let label = path.strip_prefix(UNITS)?;
    if label == "_" {
        return Some(String::new());
    }
    let mut name = Vec::with_capacity(label.len());
    let mut bytes = label.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'_' => {
                let (high, low) = (hex(bytes.next()?)?, hex(bytes.next()?)?);
                name.push(high << 4 | low);
            }
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => name.push(byte),
            _ => return None,
        }
    }
    String::from_utf8(name).ok()
}

/// The object path of a unit.
pub(super) fn of_unit(name: &str) -> String {
    let mut path = String::with_capacity(UNITS.len() + name.len() * 2);
    path.push_str(UNITS);
    if name.is_empty() {
        path.push('_');
    }
    for (i, byte) in name.bytes().enumerate() {
        if byte.is_ascii_alphabetic() || (i > 0 && byte.is_ascii_digit()) {
            path.push(char::from(byte));
        } else {
            path.push_str(&format!("_{byte:02x}"));
        }
    }
    path
}

/// The number of the job with this object path.
pub(super) fn job_id(path: &str) -> Option<u32> {
    path.strip_prefix(JOBS)?.parse().ok()
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).map(|d| d as u8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_paths() {
        assert_eq!(of_unit("hello@1.service"), "/org/freedesktop/systemd1/unit/hello_401_2eservice");
        assert_eq!(of_unit("1.service"), "/org/freedesktop/systemd1/unit/_31_2eservice");
        assert_eq!(
            unit_name("/org/freedesktop/systemd1/unit/dev_2ddisk_5cx2d_2edevice").as_deref(),
            Some("dev-disk\\x2d.device")
        );
        for bad in ["/org/freedesktop/systemd1/job/1", "/org/freedesktop/systemd1/unit/a_2", "/", "a_zz", ""]
        {
            assert_eq!(unit_name(bad), None, "{bad}");
        }
        assert_eq!(unit_name("/org/freedesktop/systemd1/unit/a_ff"), None, "not UTF-8");
        assert_eq!(job_id("/org/freedesktop/systemd1/job/4711"), Some(4711));
        assert_eq!(job_id("/org/freedesktop/systemd1/job/"), None);
        assert_eq!(job_id("/"), None);
    }

    proptest! {
        #[test]
        fn there_and_back(name in "\\PC{0,60}") {
            prop_assert_eq!(unit_name(&of_unit(&name)), Some(name));
        }
        #[test]
        fn any_path_is_survived(path in "\\PC{0,60}") {
            unit_name(&path);
            unit_name(&format!("{UNITS}{path}"));
        }
    }
}
