//! The `berth` binary with its configuration: words in, JSON out.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// The binary and the client configuration that it is to use.
#[derive(Debug, Clone)]
pub struct Berth {
    binary: PathBuf,
    config: Option<PathBuf>,
    user: Option<(u32, PathBuf)>,
}

/// What the command line said when it refused or failed.
#[derive(Debug, Clone)]
pub struct Refusal {
    /// The exit code.
    pub exit_code: i32,
    /// The problem, as JSON; null when standard error held none.
    pub problem: Value,
    /// All of standard error.
    pub text: String,
}

impl Refusal {
    /// The problem's stable code; empty when there is none.
    pub fn code(&self) -> &str {
        self.problem["code"].as_str().unwrap_or_default()
    }
}

impl Berth {
    /// The binary at this path, not yet pointed at a cluster.
    pub fn new(binary: &Path) -> Self {
        Self { binary: binary.to_owned(), config: None, user: None }
    }

    /// The same, for the cluster that this client configuration names.
    #[must_use]
    pub fn with_config(mut self, config: &Path) -> Self {
        self.config = Some(config.to_owned());
        self
    }

    /// The same, run by the user and group of this number, at home in this folder. Only root can do that.
    #[must_use]
    pub fn run_by(mut self, user_id: u32, home: &Path) -> Self {
        self.user = Some((user_id, home.to_owned()));
        self
    }

    /// Where the binary is.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// The binary that was built beside the running one: tests, demo and benches live in the same target folder.
    ///
    /// # Errors
    /// When it is not there.
    pub fn beside_this_program() -> Result<Self> {
        if let Some(path) = std::env::var_os("BERTH_BIN") {
            return Ok(Self::new(Path::new(&path)));
        }
        let own = std::env::current_exe().context("the path of this program")?;
        let found = own.ancestors().skip(1).map(|folder| folder.join("berth")).find(|path| path.is_file());
        let binary = found
            .with_context(|| format!("no berth binary near {}: build berth-cli first", own.display()))?;
        Ok(Self::new(&binary))
    }

    /// A command of the binary, for whoever wants to hold the process.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(words).stdin(Stdio::null());
        if let Some(config) = &self.config {
            command.env("BERTH_CONFIG", config);
        }
        if let Some((id, home)) = &self.user {
            // In no other group: the user is set last, and with it root's groups are given up.
            command.gid(*id).uid(*id).env("HOME", home).current_dir(home);
        }
        command
    }

    /// Runs a command that must succeed, and gives the last JSON value that it printed (null for none).
    ///
    /// # Errors
    /// When it fails: with everything it said.
    pub fn run(&self, words: &[&str]) -> Result<Value> {
        match self.attempt(words)? {
            Ok(value) => Ok(value),
            Err(refusal) => {
                bail!("berth {} ended with {}: {}", words.join(" "), refusal.exit_code, refusal.text.trim())
            }
        }
    }

    /// Runs a command that must fail.
    ///
    /// # Errors
    /// When it succeeds.
    pub fn refuses(&self, words: &[&str]) -> Result<Refusal> {
        match self.attempt(words)? {
            Ok(value) => bail!("berth {} should have failed, and said {value}", words.join(" ")),
            Err(refusal) => Ok(refusal),
        }
    }

    /// Runs a command, whatever comes of it.
    ///
    /// # Errors
    /// When it can't be run at all, or prints what is not JSON.
    pub fn attempt(&self, words: &[&str]) -> Result<Result<Value, Refusal>> {
        let mut command = self.command(words);
        command.args(["--output", "json"]);
        let output = command.output().with_context(|| format!("running {}", self.binary.display()))?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        if !output.status.success() {
            let exit_code = output.status.code().unwrap_or(-1);
            return Ok(Err(Refusal {
                exit_code,
                problem: last_json(text.as_bytes()).unwrap_or(Value::Null),
                text,
            }));
        }
        last_json(&output.stdout).map(Ok).with_context(|| {
            format!("berth {} printed {}", words.join(" "), String::from_utf8_lossy(&output.stdout))
        })
    }

    /// Starts a command and gives the process.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start(&self, words: &[&str]) -> Result<Child> {
        let mut command = self.command(words);
        command.args(["--output", "json"]).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().with_context(|| format!("starting {}", self.binary.display()))
    }
}

/// The last JSON value of a text that holds one, or one a line.
fn last_json(text: &[u8]) -> Result<Value> {
    let values: Result<Vec<Value>, _> = serde_json::Deserializer::from_slice(text).into_iter().collect();
    Ok(values?.pop().unwrap_or(Value::Null))
}
