//! What `docs/install.md` says, done: a manager and an agent as daemons with files of their own, the first token, a
//! join token, a machine that becomes a host, stays that host through restarts, and is one no longer.
//!
//! Only addresses and paths are others than there: loopback, free ports and a folder of the test. No guest is booted.

use std::fs::{self, File, Permissions};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use berth_e2e::process::{Process, wait_until};
use berth_e2e::{Berth, Refusal};
use serde_json::Value;
use tempfile::TempDir;

const START_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// A daemon in the foreground, with what it says in a file; dropped, it is killed.
struct Daemon {
    child: Child,
    said: PathBuf,
}

impl Daemon {
    fn start(berth: &Berth, words: &[&str], said: PathBuf) -> Result<Self> {
        let file = File::create(&said)?;
        let mut command = berth.command(words);
        command.stdout(file.try_clone()?).stderr(file);
        Ok(Self { child: command.spawn().context("starting a daemon")?, said })
    }

    fn said(&self) -> Result<String> {
        fs::read_to_string(&self.said).context("reading what a daemon said")
    }

    fn wait_until_it_says(&mut self, text: &str) -> Result<()> {
        wait_until(START_LIMIT, text, || {
            let said = self.said()?;
            ensure!(self.child.try_wait()?.is_none(), "the daemon has ended, having said {said}");
            Ok(said.contains(text))
        })
    }

    /// Ends it as systemd does, and fails unless it ends well.
    fn stop(&mut self) -> Result<()> {
        Process::find(self.child.id()).context("the daemon has ended before")?.signal("TERM")?;
        wait_until(STOP_LIMIT, "a daemon to end", || Ok(self.child.try_wait()?.is_some()))?;
        let status = self.child.wait()?;
        ensure!(status.success(), "the daemon ended with {status}, having said {}", self.said()?);
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have been stopped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A manager by hand, and a user who is logged in to it.
struct Site {
    /// Logged in.
    berth: Berth,
    manager: Daemon,
    address: String,
    folder: TempDir,
}

impl Site {
    fn found() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        // VMs' own users have to get through to the pools.
        fs::set_permissions(folder.path(), Permissions::from_mode(0o711))?;
        let stranger = Berth::beside_this_program()?;
        let address = free_address()?.to_string();
        let config = format!(
            "listen = \"{address}\"\nstate_dir = \"{0}/manager\"\ncertificate_names = [\"manager.example.net\"]\n",
            folder.path().display()
        );
        fs::write(folder.path().join("manager.toml"), config)?;
        let manager = run_manager(&stranger, folder.path(), "first")?;
        let site = Self { berth: stranger, manager, address, folder };
        let config = site.path("login/config.toml");
        site.log_in()?;
        Ok(Self { berth: site.berth.clone().with_config(&config), ..site })
    }

    fn log_in(&self) -> Result<()> {
        let said = self.manager.said()?;
        let token = said.split_whitespace().find(|word| word.starts_with("berth_"));
        let token_file = self.path("token");
        fs::write(&token_file, token.context("no token was shown")?)?;
        let (url, ca) = (format!("https://{}", self.address), self.path("manager/pki/ca.pem"));
        let words = ["login", "--url", &url, "--ca", text(&ca)?, "--token-file", text(&token_file)?];
        let mut command = self.berth.command(&words);
        command.env_remove("BERTH_TOKEN").env("BERTH_CONTEXT", self.path("login"));
        let output = command.output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "not logged in: {said}");
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn join_token(&self, more: &[&str]) -> Result<String> {
        let made = self.berth.run(&[&["host", "join-token"], more].concat())?;
        Ok(made["token"].as_str().context("a token")?.to_owned())
    }

    /// Writes an agent's configuration as a person would, and gives its path.
    fn agent_config(&self, name: &str) -> Result<PathBuf> {
        let (folder, listen, manager) = (self.folder.path().display(), free_address()?, &self.address);
        let config = format!(
            "name = \"{name}\"\nlisten = \"{listen}\"\nmanager = \"{manager}\"\n\
             state_dir = \"{folder}/{name}\"\nrun_dir = \"{folder}/run-{name}\"\nnetwork = {{ mode = \"user\" }}\n\
             pools = [\n  {{ name = \"default\", path = \"{folder}/shared\" }},\n  \
             {{ name = \"local\", path = \"{folder}/pool-{name}\" }},\n]\n"
        );
        let path = self.path(&format!("{name}.toml"));
        fs::write(&path, config)?;
        Ok(path)
    }

    fn join(&self, name: &str, token: &str) -> Result<Result<Value, Refusal>> {
        let config = self.path(&format!("{name}.toml"));
        let words =
            ["agent", "join", "--manager", &self.address, "--token", token, "--name", name, "--config"];
        self.berth.attempt(&[&words[..], &[text(&config)?]].concat())
    }

    fn joined(&self, name: &str, token: &str) -> Result<String> {
        let joined = self.join(name, token)?;
        let joined = joined.map_err(|refusal| anyhow::anyhow!("{name} can't join: {}", refusal.text))?;
        Ok(joined["host"].as_str().context("a host's id")?.to_owned())
    }

    fn not_joined(&self, name: &str, token: &str) -> Result<Refusal> {
        self.join(name, token)?.err().with_context(|| format!("{name} joined"))
    }

    fn run_agent(&self, name: &str) -> Result<Daemon> {
        let config = self.path(&format!("{name}.toml"));
        let words = ["agent", "run", "--config", text(&config)?];
        let mut agent = Daemon::start(&self.berth, &words, self.path(&format!("{name}.log")))?;
        agent.wait_until_it_says("the agent serves")?;
        Ok(agent)
    }

    /// Waits until a host is online and was heard since.
    fn wait_for_host(&self, name: &str, heard_before: &Value) -> Result<Value> {
        wait_until(START_LIMIT, &format!("host {name} to be online"), || {
            let host = self.berth.run(&["host", "show", name])?;
            Ok(host["state"] == "online" && host["last_seen_at"] != *heard_before)
        })?;
        self.berth.run(&["host", "show", name])
    }

    fn no_hosts(&self) -> Result<()> {
        let hosts = self.berth.run(&["host", "list"])?.to_string();
        ensure!(!hosts.contains("host-"), "there is a host: {hosts}");
        Ok(())
    }
}

fn run_manager(berth: &Berth, folder: &Path, start: &str) -> Result<Daemon> {
    let config = folder.join("manager.toml");
    let said = folder.join(format!("manager-{start}.log"));
    let mut manager = Daemon::start(berth, &["manager", "run", "--config", text(&config)?], said)?;
    manager.wait_until_it_says("the manager listens")?;
    Ok(manager)
}

fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is not text")
}

fn refused(refusal: &Refusal, exit_code: i32, code: &str, words: &str) -> Result<()> {
    let right = refusal.exit_code == exit_code && refusal.code() == code && refusal.text.contains(words);
    ensure!(right, "expected {exit_code}, {code} and '{words}', not {refusal:?}");
    Ok(())
}

#[test]
fn a_machine_becomes_a_host_and_stays_the_same_through_restarts() -> Result<()> {
    let mut site = Site::found()?;
    site.agent_config("h1")?;
    let id = site.joined("h1", &site.join_token(&[])?)?;
    let mut agent = site.run_agent("h1")?;
    let host = site.wait_for_host("h1", &Value::Null)?;
    ensure!(host["id"] == id.as_str(), "another host: {host}");
    let pools = host["inventory"]["pools"].as_array().map(Vec::len);
    ensure!(pools == Some(2), "not the pools of its file: {host}");

    agent.stop()?;
    let heard = site.berth.run(&["host", "show", "h1"])?["last_seen_at"].clone();
    let ca = fs::read(site.path("manager/pki/ca.pem"))?;
    site.manager.stop()?;
    site.manager = run_manager(&site.berth, site.folder.path(), "second")?;
    ensure!(!site.manager.said()?.contains("shown this once"), "a second first token");
    let _agent = site.run_agent("h1")?;
    let host = site.wait_for_host("h1", &heard)?;
    ensure!(host["id"] == id.as_str(), "another host after the restart: {host}");
    ensure!(fs::read(site.path("manager/pki/ca.pem"))? == ca, "another CA after the restart");
    Ok(())
}

#[test]
fn a_host_that_was_removed_can_join_again_as_another() -> Result<()> {
    let site = Site::found()?;
    site.agent_config("h1")?;
    let id = site.joined("h1", &site.join_token(&[])?)?;
    let mut agent = site.run_agent("h1")?;
    site.wait_for_host("h1", &Value::Null)?;
    let token = site.join_token(&[])?;
    let again = site.not_joined("h1", &token)?;
    refused(&again, 5, "wrong-state", &id)?;

    site.berth.run(&["host", "delete", "h1"])?;
    site.no_hosts()?;
    agent.stop()?;
    refused(&site.not_joined("h1", &token)?, 5, "wrong-state", text(&site.path("h1/identity"))?)?;
    fs::remove_dir_all(site.path("h1/identity"))?;
    let new = site.joined("h1", &token)?;
    ensure!(new != id, "the removed host's id was given again");
    let _agent = site.run_agent("h1")?;
    let host = site.wait_for_host("h1", &Value::Null)?;
    ensure!(host["id"] == new.as_str(), "another host: {host}");
    Ok(())
}

#[test]
fn a_join_token_admits_one_machine_and_only_in_its_time() -> Result<()> {
    let site = Site::found()?;
    for name in ["h1", "h2"] {
        site.agent_config(name)?;
    }
    let token = site.join_token(&[])?;
    site.joined("h1", &token)?;
    refused(&site.not_joined("h2", &token)?, 3, "unauthenticated", "was used before")?;

    let short = site.join_token(&["--expires", "1s"])?;
    let made = Instant::now();
    wait_until(START_LIMIT, "the token to expire", || Ok(made.elapsed() > Duration::from_millis(1100)))?;
    refused(&site.not_joined("h2", &short)?, 3, "unauthenticated", "has expired")?;
    let missing = site.berth.refuses(&["host", "show", "h2"])?;
    refused(&missing, 4, "not-found", "h2")
}

#[test]
fn a_machine_that_can_not_join_is_told_why_and_nothing_is_left() -> Result<()> {
    let site = Site::found()?;
    site.agent_config("h1")?;
    let token = site.join_token(&[])?;
    for nonsense in ["nonsense", "", &token[1..], &token[..token.len() - 1]] {
        refused(&site.not_joined("h1", nonsense)?, 2, "invalid-input", "berth host join-token")?;
    }
    let (head, secret) = token.rsplit_once('-').context("a join token")?;
    let unknown = format!("{head}-{}", secret.chars().rev().collect::<String>());
    refused(&site.not_joined("h1", &unknown)?, 3, "unauthenticated", "not one of this cluster")?;
    let (start, ca) = head.rsplit_once('-').context("a join token")?;
    let elsewhere = format!("{start}-{}-{secret}", ca.chars().rev().collect::<String>());
    refused(&site.not_joined("h1", &elsewhere)?, 6, "unreachable", "another fingerprint")?;
    ensure!(!site.path("h1").exists(), "a machine that has not joined has an identity");
    site.no_hosts()?;

    // A host of this machine's own would be asked for, where no file says another state directory.
    if !Path::new("/var/lib/berth").exists() {
        let (config, pool) = (site.path("etc/agent.toml"), format!("default={}", text(&site.path("pool"))?));
        let silent = free_address()?.to_string();
        for (manager, token) in [(&site.address, &elsewhere), (&silent, &token)] {
            let words =
                ["agent", "join", "--manager", manager, "--token", token, "--name", "h1", "--pool", &pool];
            let refusal = site.berth.refuses(&[&words[..], &["--config", text(&config)?]].concat())?;
            refused(&refusal, 6, "unreachable", manager)?;
            ensure!(!config.exists(), "a line with a slip in it can't be corrected: its file is there");
        }
    }
    site.joined("h1", &token).map(drop)
}
