//! Asking a person; or, without a terminal, reading what was prepared, a line for each question.

use std::io::{self, BufRead, IsTerminal as _, Write as _};

use anyhow::Context as _;

use crate::exit::Failure;

/// Longest line that is read, in bytes.
const LINE_BYTES_MAX: u64 = 64 * 1024;

/// Who is asked.
pub struct Prompt {
    input: Box<dyn BufRead>,
    is_terminal: bool,
}

impl Prompt {
    /// Whoever is at standard input.
    pub fn of_terminal() -> Self {
        Self { input: Box::new(io::stdin().lock()), is_terminal: io::stdin().is_terminal() }
    }

    /// Prepared lines, for tests.
    #[cfg(test)]
    pub fn of_text(text: &str) -> Self {
        Self { input: Box::new(io::Cursor::new(text.to_owned().into_bytes())), is_terminal: false }
    }

    /// Whether a person can be asked again.
    pub const fn is_somebody_there(&self) -> bool {
        self.is_terminal
    }

    /// Asks for something that may be seen.
    ///
    /// # Errors
    /// When nothing is answered.
    pub fn shown(&mut self, what: &str) -> Result<String, Failure> {
        self.ask(what, false)
    }

    /// Asks for something that nobody may see.
    ///
    /// # Errors
    /// When nothing is answered.
    pub fn hidden(&mut self, what: &str) -> Result<String, Failure> {
        self.ask(what, true)
    }

    /// Asks for a new password; a person twice, because nobody sees what is typed.
    ///
    /// # Errors
    /// When nothing is answered, or not the same twice.
    pub fn new_password(&mut self, what: &str) -> Result<String, Failure> {
        let first = self.hidden(what)?;
        if self.is_terminal && self.hidden("the same once more")? != first {
            return Err(Failure::field("password", "", "the same twice"));
        }
        Ok(first)
    }

    fn ask(&mut self, what: &str, is_hidden: bool) -> Result<String, Failure> {
        let _hidden = if self.is_terminal {
            eprint!("{what}: ");
            let _ = io::stderr().flush();
            is_hidden
                .then(Hidden::start)
                .transpose()
                .context("the terminal can't be told to hide what is typed")?
        } else {
            None
        };
        let mut line = String::new();
        let mut input = io::Read::take(&mut self.input, LINE_BYTES_MAX);
        input.read_line(&mut line).context("standard input can't be read")?;
        let answer = line.trim_end_matches(['\r', '\n']).to_owned();
        if answer.is_empty() {
            return Err(Failure::field(
                what,
                "",
                "an answer, on the terminal or as a line of standard input",
            ));
        }
        Ok(answer)
    }
}

/// While it lives, the terminal doesn't show what is typed.
struct Hidden(rustix::termios::Termios);

impl Hidden {
    fn start() -> io::Result<Self> {
        use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
        let before = tcgetattr(io::stdin())?;
        let mut hidden = before.clone();
        hidden.local_modes -= LocalModes::ECHO;
        tcsetattr(io::stdin(), OptionalActions::Now, &hidden)?;
        Ok(Self(before))
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        let _ = rustix::termios::tcsetattr(io::stdin(), rustix::termios::OptionalActions::Now, &self.0);
        eprintln!();
    }
}
