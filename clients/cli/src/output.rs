//! Results on standard output: tables and key-value lists for people, JSON for programs (`--json`).

use std::{
    fmt::{self, Write as _},
    io::{self, ErrorKind, Write as _},
};

use serde_json::Value as Json;

use crate::failure::Failure;

/// Where and how results are written.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    json: bool,
}

impl Output {
    /// Writes JSON if `json`, else text for people.
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    /// Whether results are JSON.
    pub fn is_json(self) -> bool {
        self.json
    }

    /// Writes `json`, or the text that `text` makes.
    pub fn show(self, json: impl FnOnce() -> Json, text: impl FnOnce() -> String) -> Result<(), Failure> {
        if self.json {
            self.line(&format!("{:#}", json()))
        } else {
            match text() {
                text if text.is_empty() => Ok(()),
                text => self.line(text.trim_end_matches('\n')),
            }
        }
    }

    /// Says that a command without a result has done its work: to programs an empty object, to people nothing.
    pub fn done(self) -> Result<(), Failure> {
        self.show(|| Json::Object(serde_json::Map::new()), String::new)
    }

    /// Writes one line.
    pub fn line(self, line: &str) -> Result<(), Failure> {
        self.bytes(format!("{line}\n").as_bytes())
    }

    /// Writes bytes as they are.
    pub fn bytes(self, bytes: &[u8]) -> Result<(), Failure> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(write_failure)
    }
}

/// What a failed write to standard output means.
pub fn write_failure(error: io::Error) -> Failure {
    match error.kind() {
        ErrorKind::BrokenPipe => Failure::OutputClosed,
        _ => Failure::local("cannot write to standard output", error),
    }
}

/// Says something to people, beside the result. Never in the way: a closed standard error is ignored.
pub fn note(text: impl fmt::Display) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Text from elsewhere, safe for a terminal: control characters, which could move its cursor or rename its
/// window, are shown escaped; line breaks and tabs are kept.
#[derive(Debug)]
pub struct Printable<'a>(pub &'a str);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            if character.is_control() && character != '\n' && character != '\t' {
                write!(formatter, "{}", character.escape_unicode())?;
            } else {
                formatter.write_char(character)?;
            }
        }
        Ok(())
    }
}

/// Rows under headings, aligned by spaces.
pub fn table<const N: usize>(headings: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut lines = vec![headings.map(str::to_owned)];
    lines.extend(rows.into_iter().map(|row| row.map(|cell| one_line(&cell))));
    let mut widths = [0; N];
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for line in &lines {
        let mut row = String::new();
        for (cell, width) in line.iter().zip(widths) {
            let _ = write!(row, "{cell:width$}  ");
        }
        text.push_str(row.trim_end());
        text.push('\n');
    }
    text
}

/// Keys and values, one pair a line. Pairs without a value are left out.
pub fn pairs<'a>(pairs: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let pairs: Vec<_> = pairs.into_iter().filter(|(_, value)| !value.is_empty()).collect();
    let width = pairs.iter().map(|(key, _)| key.chars().count()).max().unwrap_or(0);
    pairs.iter().fold(String::new(), |mut text, (key, value)| {
        let _ = writeln!(text, "{key:width$}  {}", one_line(value));
        text
    })
}

/// A cell never breaks its table.
fn one_line(cell: &str) -> String {
    Printable(cell).to_string().replace('\n', "\\n").replace('\t', "\\t")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_have_no_trailing_space() {
        let text =
            table(["ID", "AGE"], [["sb-long".to_owned(), "1s".to_owned()], ["x".to_owned(), String::new()]]);
        assert_eq!(text, "ID       AGE\nsb-long  1s\nx\n");
    }

    #[test]
    fn a_name_from_a_sandbox_cannot_drive_the_terminal_or_break_its_row() {
        let text = table(["NAME"], [["a\x1b]0;owned\x07\nb".to_owned()]]);
        assert_eq!(text, "NAME\na\\u{1b}]0;owned\\u{7}\\nb\n");
    }

    #[test]
    fn pairs_without_a_value_are_left_out() {
        assert_eq!(
            pairs([("a", "1".to_owned()), ("long", String::new()), ("b", "2".to_owned())]),
            "a  1\nb  2\n"
        );
    }
}
