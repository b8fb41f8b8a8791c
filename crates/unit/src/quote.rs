//! Quoting as Go's `%q` prints it, since texts of the original that users and scripts know
//! contain it (`invalid unit type: "bogus"`).
use std::fmt::Write as _;

/// The text in double quotes, with what cannot be printed escaped.
pub fn quoted(text: &str) -> String {
    quote(text.chars(), '"')
}

/// The character in single quotes.
pub fn quoted_char(c: char) -> String {
    quote([c], '\'')
}

/// The most characters of a text that a message repeats without quotes.
const VISIBLE: usize = 100;

/// The beginning of a text for a message, without quotes: nothing in it can do anything to a terminal.
pub(crate) fn visible(text: &str) -> String {
    let mut out = String::new();
    for (index, c) in text.chars().enumerate() {
        match c {
            _ if index == VISIBLE => {
                out += "...";
                break;
            }
            c if is_printable(c) || c == '\\' => out.push(c),
            c => out.extend(c.escape_default()),
        }
    }
    out
}

fn quote(chars: impl IntoIterator<Item = char>, mark: char) -> String {
    let mut out = String::from(mark);
    for c in chars {
        match c {
            '\\' => out.push_str("\\\\"),
            c if c == mark => out.extend(['\\', c]),
            '\u{07}' => out.push_str("\\a"),
            '\u{08}' => out.push_str("\\b"),
            '\u{0b}' => out.push_str("\\v"),
            '\u{0c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c => {
                let code = u32::from(c);
                // Writing to a String cannot fail.
                let _ = match (is_printable(c), code) {
                    (true, _) => write!(out, "{c}"),
                    (false, ..=0x7f) => write!(out, "\\x{code:02x}"),
                    (false, ..=0xffff) => write!(out, "\\u{code:04x}"),
                    (false, _) => write!(out, "\\U{code:08x}"),
                };
            }
        }
    }
    out.push(mark);
    out
}

/// Near enough to Go's `unicode.IsPrint`: the only white space printed as itself is the blank, and
/// what Rust's own debug form escapes is escaped here.
fn is_printable(c: char) -> bool {
    c == ' ' || c == '"' || c == '\'' || (!c.is_whitespace() && c.escape_debug().len() == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_as_go_does() {
        let cases = [
            ("bogus", r#""bogus""#),
            ("a \"b\" 'c' \\", r#""a \"b\" 'c' \\""#),
            ("\0\n\r\t\u{7}\u{7f}", r#""\x00\n\r\t\a\x7f""#),
            ("ä☃\u{200b}\u{e0001}", "\"ä☃\\u200b\\U000e0001\""),
        ];
        for (text, want) in cases {
            assert_eq!(quoted(text), want);
        }
        assert_eq!(quoted_char('ä'), "'ä'");
        assert_eq!(quoted_char('\''), r"'\''");
        assert_eq!(quoted_char('"'), "'\"'");
        assert_eq!(quoted_char('\0'), r"'\x00'");
    }
}
