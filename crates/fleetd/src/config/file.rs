//! The form of fleet.conf: lines of `key=value`, as the original's INI reader took them.
//!
//! Only the form is read here; which keys there are and what they mean is the parent's. The rules are the
//! original's, odd ones included, since existing files rely on them:
//!
//! - keys are case-insensitive and hold no blanks; blanks around the `=` are skipped;
//! - a value is quoted only when one pair of quotes, single or double, encloses all of it to the end of the line;
//! - in any other value `#` and `;` start a comment, even without a blank before them, and quotes are kept;
//! - a line that starts with `#` or `;` is a comment;
//! - a backslash at the end of a line, of a comment too, continues it with the next;
//! - the last value of a key counts.

/// One `key=value`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key, in lower case.
    pub key: String,
    /// The value, without its quotes or comment.
    pub value: String,
    /// The line it starts on, from 1.
    pub line: usize,
    /// The section it stands in, in lower case; empty before the first.
    pub section: String,
}

/// Something in a file that is allowed but is probably not meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Oddity {
    /// The line, from 1.
    pub line: usize,
    /// What is odd, for the user; repeats no value, which may be a secret.
    pub message: String,
}

/// All of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// The entries in their order.
    pub entries: Vec<Entry>,
    /// What is probably not meant.
    pub oddities: Vec<Oddity>,
}

/// A line that can't be read; repeats nothing of it, since it may hold a secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyntaxError {
    /// The line, from 1.
    pub line: usize,
    /// What is wrong, for the user.
    pub reason: &'static str,
}

/// Reads the text of a file.
pub fn parse(text: &str) -> Result<Contents, SyntaxError> {
    let mut contents = Contents::default();
    let mut section = String::new();
    let mut lines = text.split('\n').enumerate().map(|(index, line)| (index + 1, line.trim()));
    while let Some((number, first)) = lines.next() {
        let error = |reason| SyntaxError { line: number, reason };
        let mut line = first.to_owned();
        while line.ends_with('\\') {
            line.pop();
            let (_, next) = lines
                .next()
                .ok_or_else(|| error("the last line ends in a backslash, but nothing follows"))?;
            line.push_str(next);
        }
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if line.contains(|c: char| c.is_control() && c != '\t') {
            return Err(error("holds a control character"));
        }
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            section = name.trim().to_lowercase();
            continue;
        }
        let (key, rest) = line
            .split_once('=')
            .map(|(key, rest)| (key.trim_end_matches([' ', '\t']), rest.trim_start_matches([' ', '\t'])))
            .filter(|(key, _)| !key.is_empty() && !key.contains([' ', '\t']))
            .ok_or_else(|| error("is neither KEY=VALUE nor a [section] nor a comment"))?;
        let key = key.to_lowercase();
        let value = match enclosed(rest, '"').or_else(|| enclosed(rest, '\'')) {
            Some(value) => value,
            None => {
                let (value, oddity) = unquoted(rest);
                if let Some(what) = oddity {
                    let message = format!("{key}: {what}");
                    contents.oddities.push(Oddity { line: number, message });
                }
                value
            }
        };
        let value = value.to_owned();
        contents.entries.push(Entry { key, value, line: number, section: section.clone() });
    }
    Ok(contents)
}

/// What a pair of quotes encloses, when they enclose all of it and there is no third.
fn enclosed(text: &str, quote: char) -> Option<&str> {
    text.strip_prefix(quote)?.strip_suffix(quote).filter(|inner| !inner.contains(quote))
}

/// A value up to its comment, and what is odd about it.
fn unquoted(text: &str) -> (&str, Option<&'static str>) {
    let (value, comment) = match text.find(['#', ';']) {
        Some(at) => text.split_at(at),
        None => (text, ""),
    };
    let cut = !comment.is_empty() && !value.is_empty() && !value.ends_with([' ', '\t']);
    let value = value.trim();
    let oddity = if value.starts_with(['"', '\'']) {
        Some("the quotes are taken as part of the value, because they don't enclose all of the line's rest")
    } else if cut {
        Some("the value ends before the # or ; in it; put all of it in quotes if that is not meant")
    } else {
        None
    };
    (value, oddity)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn values(text: &str) -> Vec<(String, String)> {
        parse(text).unwrap().entries.into_iter().map(|entry| (entry.key, entry.value)).collect()
    }

    fn value(line: &str) -> String {
        let all = values(line);
        assert_eq!(all.len(), 1, "{line}");
        all[0].1.clone()
    }

    /// The forms of golden/23-config.txt.
    #[test]
    fn forms_of_a_value() {
        for (line, expected) in [
            (r#"metadata="region=us-west,az=1""#, "region=us-west,az=1"),
            (r#"metadata='region=us-west,az=1'"#, "region=us-west,az=1"),
            (r#"metadata=region=us-west,az=1"#, "region=us-west,az=1"),
            ("metadata=\" region = us-west ,\taz = 1 \"", " region = us-west ,\taz = 1 "),
            (r#"metadata = "spaces=around""#, "spaces=around"),
            ("metadata\t=\t'tabs=around'\r", "tabs=around"),
            (r#"metadata="""#, ""),
            ("metadata=", ""),
            ("metadata=# nothing", ""),
            ("metadata= ; nothing", ""),
            (r#"metadata="k=v" # comment"#, r#""k=v""#),
            ("metadata=k=v # comment", "k=v"),
            ("metadata=k=v;comment", "k=v"),
            (r##"metadata="k=#v;""##, "k=#v;"),
            (r#"metadata="a"b""#, r#""a"b""#),
            (r#"metadata='it"s'"#, r#"it"s"#),
            (r#"metadata=""#, r#"""#),
            (
                r#"etcd_servers=["http://127.0.0.1:9", "http://172.30.7.1:22379"]"#,
                r#"["http://127.0.0.1:9", "http://172.30.7.1:22379"]"#,
            ),
        ] {
            assert_eq!(value(line), expected, "{line}");
        }
    }

    #[test]
    fn keys_are_case_insensitive_and_comments_are_skipped() {
        let text = "# metadata=\"commented=out\"\n; more\n\n  Metadata=\"upper=case\"\n";
        assert_eq!(values(text), [("metadata".into(), "upper=case".into())]);
    }

    #[test]
    fn a_backslash_continues_a_line() {
        let text = "metadata=a=1,\\\n   b=2,\\  \n\tc=3\n# comment \\\nverbosity=1\npublic_ip=x\n\\\n\n";
        let contents = parse(text).unwrap();
        let got: Vec<_> =
            contents.entries.iter().map(|e| (e.key.as_str(), e.value.as_str(), e.line)).collect();
        assert_eq!(got, [("metadata", "a=1,b=2,c=3", 1), ("public_ip", "x", 6)]);
        assert_eq!(parse("a=b\\").unwrap_err().line, 1);
    }

    #[test]
    fn sections_are_remembered() {
        let contents = parse("a=1\n[ Section ]\nb=2\n[]\nc=3").unwrap();
        let got: Vec<_> =
            contents.entries.iter().map(|e| (e.key.as_str(), e.section.as_str(), e.line)).collect();
        assert_eq!(got, [("a", "", 1), ("b", "section", 3), ("c", "", 5)]);
    }

    #[test]
    fn a_line_that_cannot_be_read_is_named_but_not_repeated() {
        for text in
            ["ok=1\nhunter2", "ok=1\nhunter2 x = 1", "ok=1\n=hunter2", "ok=1\n[hunter2] # x", "ok=1\na=\0"]
        {
            let error = parse(text).unwrap_err();
            assert_eq!(error.line, 2, "{text}");
            assert!(!error.reason.contains("hunter2"));
        }
    }

    #[test]
    fn what_is_probably_not_meant_is_named_but_not_repeated() {
        let contents =
            parse("verbosity=0 # fine\netcd_password=hun#ter2\nmetadata=\"k=v\" # comment").unwrap();
        let got: Vec<_> =
            contents.oddities.iter().map(|o| (o.line, o.message.split(':').next().unwrap())).collect();
        assert_eq!(got, [(2, "etcd_password"), (3, "metadata")]);
        assert!(!contents.oddities[0].message.contains("hun"));
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "([a-z=\"'#; \\\\\\[\\]\t\n]|\\PC){0,200}") {
            if let Ok(contents) = parse(&text) {
                let lines = text.split('\n').count();
                for entry in contents.entries {
                    prop_assert!((1..=lines).contains(&entry.line));
                    prop_assert_eq!(entry.key.to_lowercase(), entry.key);
                }
            }
        }

        #[test]
        fn a_value_in_double_quotes_is_kept_to_the_byte(value in "[^\"\\p{Cc}]{0,60}") {
            let contents = parse(&format!("Key = \"{value}\"")).unwrap();
            prop_assert_eq!(&contents.entries[0].value, &value);
            prop_assert_eq!(contents.oddities, vec![]);
        }
    }
}
