//! Reads the text of a unit file into options, as the original's parser did.
//!
//! That parser is more lenient than systemd's in places (anything may stand before the first
//! section, and a section header may stand within such a line) and stricter in others (a line that
//! is neither empty, comment, header nor option is an error). Both are part of what users know.
use crate::UnitOption;
use crate::quote::visible;

/// A line of this many bytes, its end not counted, is too long: the original took lines of at most
/// 2048 bytes with their newline.
pub const MAX_LINE: usize = 2048;

/// Why a text is not a unit file, with the line (from 1). Display gives the original's text without
/// the line; `line()` gives the place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{fault}")]
pub struct ParseError {
    line: usize,
    fault: Fault,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
enum Fault {
    #[error("unexpected newline encountered while parsing option name")]
    NewlineInName,
    #[error("unexpected end of file encountered while parsing option name")]
    EndInName,
    #[error("unable to find end of section")]
    SectionWithoutEnd,
    #[error("found garbage after section name {}: {}", visible(.section), visible(.garbage))]
    GarbageAfterSection { section: String, garbage: String },
    #[error("line too long (max {MAX_LINE} bytes)")]
    LineTooLong,
    #[error("unit file contains a NUL byte")]
    Nul,
    #[error("unit file is not UTF-8 text")]
    NotUtf8,
    #[error("unit file too large (max {} bytes)", crate::file::MAX_SIZE)]
    TooLarge,
}

impl ParseError {
    /// The line of the mistake, from 1.
    pub fn line(&self) -> usize {
        self.line
    }

    /// For a text of which `before` is all that is allowed.
    pub(crate) fn too_large(before: &[u8]) -> Self {
        ParseError { line: line_after(before), fault: Fault::TooLarge }
    }

    /// For a text that is UTF-8 only in `before`.
    pub(crate) fn not_utf8(before: &[u8]) -> Self {
        ParseError { line: line_after(before), fault: Fault::NotUtf8 }
    }
}

/// The line in which what follows this text stands.
fn line_after(text: &[u8]) -> usize {
    1 + text.iter().filter(|&&b| b == b'\n').count()
}

/// All options with the line each begins in, or the first error.
pub(crate) fn read(text: &str) -> Result<Vec<(UnitOption, usize)>, ParseError> {
    if let Some(at) = text.find('\0') {
        return Err(ParseError { line: line_after(&text.as_bytes()[..at]), fault: Fault::Nul });
    }
    let too_long = text
        .split('\n')
        .position(|line| without_cr(line).len() >= MAX_LINE)
        .map(|index| ParseError { line: index + 1, fault: Fault::LineTooLong });
    match (read_options(text), too_long) {
        // The original looked at the length of a line before it read the line.
        (Err(error), Some(too_long)) if error.line < too_long.line => Err(error),
        (_, Some(too_long)) => Err(too_long),
        (result, None) => result,
    }
}

fn read_options(text: &str) -> Result<Vec<(UnitOption, usize)>, ParseError> {
    let mut reader = Reader { rest: text, line: 1 };
    let mut section: Option<String> = None;
    let mut options = Vec::new();
    while let Some(c) = reader.rest.chars().next() {
        match &section {
            _ if c == '[' => section = Some(reader.section()?),
            _ if is_comment(c) => reader.comment(),
            Some(section) if !c.is_whitespace() => {
                let line = reader.line;
                let name = reader.name()?;
                let value = reader.value();
                options.push((UnitOption { section: section.clone(), name, value }, line));
            }
            _ => {
                reader.take(c.len_utf8());
            }
        }
    }
    Ok(options)
}

fn is_comment(c: char) -> bool {
    matches!(c, '#' | ';')
}

fn without_cr(line: &str) -> &str {
    line.strip_suffix('\r').unwrap_or(line)
}

/// A place in the text. Every method takes something off the rest.
struct Reader<'a> {
    rest: &'a str,
    line: usize,
}

impl<'a> Reader<'a> {
    /// So many bytes, which must end at a character boundary.
    fn take(&mut self, bytes: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at(bytes);
        self.line += taken.bytes().filter(|&b| b == b'\n').count();
        self.rest = rest;
        taken
    }

    /// The rest of the line, without its newline.
    fn take_line(&mut self) -> &'a str {
        let end = self.rest.find('\n').map_or(self.rest.len(), |at| at + 1);
        let line = self.take(end);
        line.strip_suffix('\n').unwrap_or(line)
    }

    fn error(&self, fault: Fault) -> ParseError {
        ParseError { line: self.line, fault }
    }

    /// `[Name]` and the line's end. A name may contain anything but `]`.
    fn section(&mut self) -> Result<String, ParseError> {
        let end = self.rest.find(']').ok_or_else(|| self.error(Fault::SectionWithoutEnd))?;
        let name = self.take(end + 1)[1..end].to_owned();
        let line = self.line;
        let garbage = self.take_line().trim();
        if garbage.is_empty() {
            return Ok(name);
        }
        let fault = Fault::GarbageAfterSection { section: name, garbage: garbage.to_owned() };
        Err(ParseError { line, fault })
    }

    /// A comment, which goes on in the next line after a backslash. (It no longer does in systemd,
    /// but a file whose comment does would lose its hash, or not be accepted at all.)
    fn comment(&mut self) {
        loop {
            let line = self.take_line();
            if !line.strip_suffix(' ').unwrap_or(line).ends_with('\\') {
                return;
            }
        }
    }

    /// What stands before the `=`, and that.
    fn name(&mut self) -> Result<String, ParseError> {
        match self.rest.find(['=', '\n', '\r']) {
            None => Err(self.error(Fault::EndInName)),
            Some(at) if self.rest.as_bytes()[at] == b'=' => {
                let name = self.take(at + 1);
                Ok(name[..at].trim().to_owned())
            }
            Some(_) => Err(self.error(Fault::NewlineInName)),
        }
    }

    /// The value with all lines it goes on in. It goes on after a backslash at the very end of a
    /// line, and ends at a blank line, of which a newline is kept at its end.
    ///
    /// Of blanks after a last backslash one is kept: without it, the value would go on in the next
    /// line once it is written out, and the unit mean something else. (The original lost it.)
    fn value(&mut self) -> String {
        let mut value = String::new();
        loop {
            let line = without_cr(self.take_line());
            if line.trim().is_empty() {
                break;
            }
            value.push_str(line);
            if !line.ends_with('\\') {
                break;
            }
            value.push('\n');
            while self.rest.trim_start_matches([' ', '\t']).starts_with(is_comment) {
                self.take_line();
            }
        }
        let trimmed = value.trim();
        let kept = if value.ends_with('\n') {
            "\n"
        } else if trimmed.ends_with('\\') {
            " "
        } else {
            ""
        };
        format!("{trimmed}{kept}")
    }
}
