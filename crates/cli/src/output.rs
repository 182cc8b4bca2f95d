//! Answers: as tables for people, as JSON or YAML for programs.
//!
//! What was asked for goes to standard output, everything about how it is going to standard error; so a pipe gets
//! answers only. Text that came from elsewhere (a note, QEMU's last words) is stripped of what would drive a terminal.

use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex, PoisonError};

use comfy_table::presets;
use serde::Serialize;

use crate::exit::Failure;

/// How to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people.
    Table,
    /// For programs: one document, or a line an event while waiting.
    Json,
    /// For programs and people who like it.
    Yaml,
}

type Writer = Arc<Mutex<Box<dyn Write + Send>>>;

/// Where answers go.
#[derive(Clone)]
pub struct Output {
    format: Format,
    answers: Writer,
    remarks: Writer,
    draws: bool,
}

impl Output {
    /// Standard output and standard error.
    pub fn to_terminal(format: Format) -> Self {
        let draws = io::stderr().is_terminal() && format != Format::Json;
        Self { draws, ..Self::to_writers(format, Box::new(io::stdout()), Box::new(io::stderr())) }
    }

    /// Any two writers, for answers and for remarks.
    pub fn to_writers(
        format: Format,
        answers: Box<dyn Write + Send>,
        remarks: Box<dyn Write + Send>,
    ) -> Self {
        Self {
            format,
            answers: Arc::new(Mutex::new(answers)),
            remarks: Arc::new(Mutex::new(remarks)),
            draws: false,
        }
    }

    /// How to answer.
    pub const fn format(&self) -> Format {
        self.format
    }

    /// Whether somebody looks at a terminal, so that a bar may be drawn on standard error.
    pub const fn draws(&self) -> bool {
        self.draws
    }

    /// Answers with a list.
    ///
    /// # Errors
    /// When nobody reads any more.
    pub fn list<T: Serialize>(&self, items: &[T], table: impl FnOnce() -> Table) -> Result<(), Failure> {
        match self.format {
            Format::Table => self.answer(&table().render()),
            Format::Json | Format::Yaml => self.document(&items),
        }
    }

    /// Answers with one thing.
    ///
    /// # Errors
    /// When nobody reads any more.
    pub fn one<T: Serialize>(&self, item: &T, facts: impl FnOnce() -> Facts) -> Result<(), Failure> {
        match self.format {
            Format::Table => self.answer(&facts().render()),
            Format::Json | Format::Yaml => self.document(item),
        }
    }

    /// Answers that something was done: a sentence for people, the thing itself for programs.
    ///
    /// # Errors
    /// When nobody reads any more.
    pub fn done<T: Serialize>(&self, item: &T, sentence: impl FnOnce() -> String) -> Result<(), Failure> {
        match self.format {
            Format::Table => self.answer(&sentence()),
            Format::Json | Format::Yaml => self.document(item),
        }
    }

    /// One line of JSON, at once: an event.
    ///
    /// # Errors
    /// When nobody reads any more.
    pub fn event<T: Serialize>(&self, event: &T) -> Result<(), Failure> {
        self.answer(&serde_json::to_string(event).expect("answers are plain data"))
    }

    /// Text that is the same in every format.
    ///
    /// # Errors
    /// When nobody reads any more.
    pub fn text(&self, text: &str) -> Result<(), Failure> {
        self.answer(text.trim_end())
    }

    /// A remark on standard error, for people.
    pub fn remark(&self, text: &str) {
        if self.format != Format::Json {
            self.error(text);
        }
    }

    /// Something on standard error, whatever the format.
    pub fn error(&self, text: &str) {
        // Nobody is left to tell when this fails.
        let _ = write_line(&self.remarks, text);
    }

    fn document<T: Serialize>(&self, item: &T) -> Result<(), Failure> {
        let text = match self.format {
            Format::Yaml => serde_yaml_ng::to_string(item).expect("answers are plain data"),
            Format::Json | Format::Table => {
                serde_json::to_string_pretty(item).expect("answers are plain data")
            }
        };
        self.answer(text.trim_end())
    }

    fn answer(&self, text: &str) -> Result<(), Failure> {
        match write_line(&self.answers, text) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Failure::OutputClosed),
            Err(error) => Err(anyhow::Error::new(error).context("standard output can't be written").into()),
        }
    }
}

fn write_line(writer: &Writer, text: &str) -> io::Result<()> {
    let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
    writeln!(writer, "{text}")?;
    writer.flush()
}

/// Text without what would drive a terminal; line breaks become spaces, so that a cell stays a cell.
pub fn plain(text: &str) -> String {
    text.chars()
        .map(|character| match character {
            '\n' | '\r' | '\t' => ' ',
            other if other.is_control() => '\u{fffd}',
            other => other,
        })
        .collect()
}

/// Things in rows.
pub struct Table {
    headers: &'static [&'static str],
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns.
    pub const fn new(headers: &'static [&'static str]) -> Self {
        Self { headers, rows: Vec::new() }
    }

    /// A table with a row for each item.
    pub fn of<T, const COLUMNS: usize>(
        headers: &'static [&'static str; COLUMNS],
        items: &[T],
        row: impl Fn(&T) -> [String; COLUMNS],
    ) -> Self {
        Self { headers, rows: items.iter().map(|item| row(item).into()).collect() }
    }

    /// Adds a row.
    pub fn push(&mut self, row: Vec<String>) {
        self.rows.push(row);
    }

    /// The table as text, without blanks at the ends of lines.
    pub fn render(&self) -> String {
        let mut table = comfy_table::Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(self.headers.iter().copied());
        for row in &self.rows {
            table.add_row(row.iter().map(|cell| plain(cell)));
        }
        for column in table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        table.trim_fmt()
    }
}

/// What is known of one thing: names and values in two columns.
#[derive(Default)]
pub struct Facts {
    rows: Vec<(String, String)>,
}

impl Facts {
    /// No facts yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a fact.
    #[must_use]
    pub fn with(mut self, name: impl Into<String>, value: impl ToString) -> Self {
        self.rows.push((name.into(), value.to_string()));
        self
    }

    /// Adds a fact if there is one.
    #[must_use]
    pub fn with_some(self, name: &str, value: Option<impl ToString>) -> Self {
        match value {
            Some(value) => self.with(name, value),
            None => self,
        }
    }

    /// The facts as text.
    pub fn render(&self) -> String {
        let mut table = comfy_table::Table::new();
        table.load_style(presets::NOTHING);
        for (name, value) in &self.rows {
            table.add_row([plain(name), plain(value)]);
        }
        for column in table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        table.trim_fmt()
    }
}

/// What stands in a cell that has nothing to say.
pub const NOTHING: &str = "-";

/// A value, or the sign for none.
pub fn or_nothing(value: Option<impl ToString>) -> String {
    value.map_or_else(|| NOTHING.to_owned(), |value| value.to_string())
}

/// An instant for people: UTC, whole seconds.
pub fn instant(value: berth_model::Timestamp) -> String {
    let text = value.to_string();
    let seconds = text.split_once('.').map_or(text.as_str(), |(seconds, _)| seconds);
    format!("{}Z", seconds.replace('T', " ").trim_end_matches('Z'))
}

/// How a kebab-case enumeration reads, as on the wire.
pub fn word<T: Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(text)) => text,
        Ok(other) => other.to_string(),
        Err(_) => NOTHING.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_no_frame_and_no_trailing_blanks() {
        let table = Table::of(&["NAME", "STATE"], &[("books", "running"), ("a", "-")], |row| {
            [row.0.to_owned(), row.1.to_owned()]
        });
        assert_eq!(table.render(), "NAME   STATE\nbooks  running\na      -");
        assert_eq!(Table::new(&["NAME"]).render(), "NAME");
    }

    #[test]
    fn facts_stand_in_two_columns() {
        let facts = Facts::new().with("name", "books").with_some("trouble", None::<String>).with("vcpus", 2);
        assert_eq!(facts.render(), "name   books\nvcpus  2");
    }

    #[test]
    fn a_cell_can_not_drive_the_terminal() {
        let table = Table::of(&["NOTE"], &["a\x1b[31mb\r\nc"], |text| [(*text).to_owned()]);
        assert_eq!(table.render(), "NOTE\na\u{fffd}[31mb  c");
    }

    #[test]
    fn instants_are_in_whole_seconds() {
        let value = berth_model::Timestamp::from_millis(1_795_352_752_007);
        assert_eq!(instant(value), "2026-11-22 13:05:52Z");
    }
}
