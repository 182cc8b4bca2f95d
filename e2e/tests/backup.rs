//! Backups: a cluster is lost altogether, and its VM goes on in another one.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use berth_e2e::process::{Process, wait_until, with_words};
use berth_e2e::testing::{Pool, answering, guest_in, up};
use berth_e2e::{Cluster, Console};
use guest_probe::memory::{Rewrite, Settings};
use serde_json::Value;

const WORK: Settings = Settings { memory_mib: 48, rate_mib_s: 1, hot_mib: 0, rewrite: Rewrite::Whole };
/// What the guest finds of its machine, typed so that the answer is not in the question.
const FOUND: &str = "echo found-$(ls -d /sys/firmware/efi /dev/tpm0 | wc -l)";
const LIMIT: Duration = Duration::from_secs(120);
const PASSWORD: &str = "hunter2-and-more";

/// A file with the password, and the words that make a repository in this directory known.
fn known(cluster: &Cluster, folder: &Path, more: &[&str]) -> Result<Value> {
    let password = folder.join("password");
    std::fs::write(&password, PASSWORD)?;
    let (url, password) = (folder.join("backups"), password.to_str().context("path")?.to_owned());
    let url = url.to_str().context("path")?;
    let words = ["repository", "create", "offsite", "--url", url, "--password-file", &password];
    cluster.berth.run(&[&words[..], more].concat())
}

/// What an operation has to say, of the last event that was told of it.
fn facts(event: &Value) -> &Value {
    &event["operation"]["result"]["facts"]
}

fn number(operation: &Value, name: &str) -> Result<u64> {
    facts(operation)[name].as_u64().with_context(|| format!("no {name} in {operation:#}"))
}

#[test]
fn a_vm_goes_on_where_its_backup_stands_in_a_cluster_that_has_nothing_else() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let first = tempfile::tempdir()?;
    let cluster = up(first.path(), 1)?;
    let machine = [
        "--memory",
        "192MiB",
        "--disk",
        "256MiB",
        "--data-disk",
        "128MiB",
        "--pool",
        "local",
        "--firmware",
        "uefi",
        "--tpm",
    ];
    let guest = cluster.create_guest("books", "probe", &machine)?;
    guest.probe.set(WORK, Duration::from_secs(60))?;
    guest.probe.write(5)?;
    let missing =
        cluster.berth.refuses(&["snapshot", "export", "books", "baseline", "--repository", "offsite"])?.text;
    ensure!(missing.contains("offsite"), "{missing}");
    known(&cluster, folder.path(), &["--init"])?;

    cluster.berth.run(&["snapshot", "create", "books", "--name", "one"])?;
    let one =
        watched(|| cluster.berth.run(&["snapshot", "export", "books", "one", "--repository", "offsite"]))?;
    guest.probe.write(2)?;
    cluster.berth.run(&["snapshot", "create", "books", "--name", "two"])?;
    let nonce = guest.probe.tick()?.nonce;
    let two = cluster.berth.run(&["snapshot", "export", "books", "two", "--repository", "offsite"])?;
    let (added_one, added_two) = (number(&one, "added_bytes")?, number(&two, "added_bytes")?);
    eprintln!(
        "exported {} bytes: {added_one} added, then {added_two} of {}",
        number(&one, "bytes")?,
        number(&two, "bytes")?
    );
    ensure!(added_two < added_one / 2, "the second export stored {added_two} bytes, the first {added_one}");
    guest.probe.write(4)?;
    ensure!(guest.verify()?.files == 11, "an export does nothing to the VM");

    let listed = cluster.berth.run(&["repository", "snapshots", "offsite"])?;
    ensure!(listed.as_array().is_some_and(|all| all.len() == 2), "{listed:#}");
    no_secret_is_told(&cluster)?;
    restic(folder.path(), &["check", "--read-data"])?;
    let backup = facts(&one)["backup"].as_str().context("no backup")?;
    restores_the_same(folder.path(), backup, &first.path().join("cluster/pools"))?;
    cluster.down()?;

    goes_on_elsewhere(folder.path(), &nonce, backup)
}

/// A new cluster, and both backups in it: the one by its names, where it stood, the other by its id, from the disk alone.
fn goes_on_elsewhere(folder: &Path, nonce: &str, backup: &str) -> Result<()> {
    let place = tempfile::tempdir()?;
    let berth = berth_e2e::Berth::beside_this_program()?;
    let options =
        berth_e2e::UpOptions { dir: place.path().join("cluster"), hosts: 1, link_mbit: None, keep: false };
    let cluster = Cluster::up(&berth, &options)?.telling_logs();
    known(&cluster, folder, &[])?;
    let import = |backup: &str, more: &[&str]| {
        let words = ["snapshot", "import", backup, "--repository", "offsite", "--name"];
        cluster.berth.run(&[&words[..], more].concat())
    };
    import("default/books/two", &["again"])?;
    let again = answering(&cluster, "again")?;
    let seen = again.verify()?;
    ensure!(seen.tick.nonce == nonce && seen.files == 7, "it is not the guest that was kept: {seen:?}");
    again.probe.write(1)?;
    cluster.berth.run(&["snapshot", "verify", "again", "baseline", "--boot"])?;
    cluster.berth.run(&["snapshot", "restore", "again", "baseline", "--no-undo"])?;
    ensure!(answering(&cluster, "again")?.verify()?.files == 7, "its baseline is the snapshot");

    import(&backup[..8], &["cold", "--cold"])?;
    let cold = answering(&cluster, "cold")?.verify()?;
    ensure!(cold.tick.nonce != nonce && cold.files == 5, "it did not begin anew on the snapshot's disk");
    Console::attach(&cluster.berth, "cold")?.type_until(FOUND, "found-2")?;
    let pools = place.path().join("cluster/pools");
    ensure!(!any_staged(&pools)?, "something is left staged below {}", pools.display());
    cluster.down()
}

#[test]
fn what_is_wrong_with_a_repository_is_said_and_leaves_nothing() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let place = tempfile::tempdir()?;
    let cluster = up(place.path(), 1)?;
    guest_in(&cluster, "books", Pool::Shared)?;
    let none = known(&cluster, folder.path(), &[]).err().context("there is none")?.to_string();
    ensure!(none.contains("there is no repository at"), "{none}");
    known(&cluster, folder.path(), &["--init"])?;
    cluster.berth.run(&["snapshot", "export", "books", "baseline", "--repository", "offsite"])?;
    let password = folder.path().join("password");
    std::fs::write(&password, "wrong")?;
    let (url, password) = (folder.path().join("backups"), password.to_str().context("path")?.to_owned());
    let words = [
        "repository",
        "create",
        "other",
        "--url",
        url.to_str().context("path")?,
        "--password-file",
        &password,
    ];
    let wrong = cluster.berth.refuses(&words)?.text;
    ensure!(wrong.contains("the password does not open the repository at"), "{wrong}");

    // Bytes that somebody flipped are found, and no VM comes of them.
    for directory in std::fs::read_dir(url.join("data"))? {
        for pack in std::fs::read_dir(directory?.path())? {
            let path = pack?.path();
            let mut bytes = std::fs::read(&path)?;
            let middle = bytes.len() / 3;
            bytes[middle] ^= 0x55;
            std::fs::write(&path, bytes)?;
        }
    }
    let words = ["snapshot", "import", "default/books", "--repository", "offsite", "--name", "again"];
    let damaged = cluster.berth.refuses(&words)?.text;
    ensure!(damaged.contains("is damaged") || damaged.contains("refused"), "{damaged}");
    ensure!(cluster.vm("again").is_err(), "a VM came of a backup that is damaged");
    std::fs::remove_dir_all(&url)?;
    let gone =
        cluster.berth.refuses(&["snapshot", "export", "books", "baseline", "--repository", "offsite"])?.text;
    ensure!(gone.contains(url.to_str().context("path")?), "{gone}");
    ensure!(!any_staged(&place.path().join("cluster/pools"))?, "something is left staged");
    cluster.down()
}

/// Does something that has a process work on a repository, and looks meanwhile that its words and its environment don't
/// hold the password.
fn watched<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let watch = std::thread::spawn(move || {
        let (mut seen, mut told) = (false, false);
        while ended.recv_timeout(Duration::from_millis(20)) == Err(RecvTimeoutError::Timeout) {
            for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
                let read = |name: &str| std::fs::read(process.path().join(name)).unwrap_or_default();
                let words = String::from_utf8_lossy(&read("cmdline")).into_owned();
                if words.contains("backup-worker") {
                    seen = true;
                    told |= words.contains(PASSWORD)
                        || String::from_utf8_lossy(&read("environ")).contains(PASSWORD);
                }
            }
        }
        (seen, told)
    });
    let done = work();
    drop(end);
    let (seen, told) = watch.join().map_err(|_| anyhow!("the watch broke off"))?;
    ensure!(seen && !told, "a worker was seen: {seen}, and had the password: {told}");
    done
}

/// What `restic` alone makes of a backup is what the hosts have.
fn restores_the_same(folder: &Path, backup: &str, pools: &Path) -> Result<()> {
    let target = folder.join("restored");
    restic(folder, &["restore", backup, "--target", target.to_str().context("path")?])?;
    let mut files = Vec::new();
    below(&target, &mut files)?;
    let manifest =
        files.iter().find(|path| path.ends_with("snapshot/snapshot.json")).context("no manifest")?;
    let manifest: Value = serde_json::from_slice(&std::fs::read(manifest)?)?;
    let snapshot = manifest["snapshot"].as_str().context("no snapshot")?;
    let mut kept = Vec::new();
    below(pools, &mut kept)?;
    let mut names = Vec::new();
    for path in files {
        let name = path.file_name().and_then(|name| name.to_str()).context("name")?.to_owned();
        let is_own = path.parent().is_some_and(|parent| parent.ends_with("snapshot"));
        let there = kept
            .iter()
            .find(|there| there.ends_with(if is_own { format!("{snapshot}/{name}") } else { name.clone() }));
        match there {
            Some(there) => ensure!(std::fs::read(there)? == std::fs::read(&path)?, "{name} is another one"),
            None => ensure!(name == "backup.json", "{name} is not in the pools"),
        }
        names.push(name);
    }
    for name in ["backup.json", "memory.raw", "device.bin", "pages.idx", "vars.fd", "tpm2-00.permall"] {
        ensure!(names.iter().any(|there| there == name), "the backup lacks {name}: {names:?}");
    }
    Ok(())
}

fn below(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            below(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

/// The password stands in no answer, no log and no audit.
fn no_secret_is_told(cluster: &Cluster) -> Result<()> {
    let shown = cluster.berth.run(&["repository", "show", "offsite"])?.to_string();
    let audit = cluster.berth.run(&["audit", "list"])?.to_string();
    ensure!(!shown.contains(PASSWORD) && !audit.contains(PASSWORD), "a password is shown");
    for entry in std::fs::read_dir(cluster.dir().join("log"))? {
        let text = std::fs::read(entry?.path())?;
        ensure!(!String::from_utf8_lossy(&text).contains(PASSWORD), "a password is in a log");
    }
    Ok(())
}

fn any_staged(pools: &Path) -> Result<bool> {
    for pool in std::fs::read_dir(pools)? {
        let pool = pool?.path();
        for staging in [pool.join("staging"), pool.join("local/staging")] {
            if staging.is_dir() && std::fs::read_dir(&staging)?.next().is_some() {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

fn restic(folder: &Path, words: &[&str]) -> Result<()> {
    let mut command = Command::new("restic");
    command.args(words).env("RESTIC_REPOSITORY", folder.join("backups")).env("RESTIC_PASSWORD", PASSWORD);
    let output = command.env("HOME", folder).output().context("restic: 'make deps' installs it")?;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "restic {words:?}: {}{told}", String::from_utf8_lossy(&output.stdout));
    Ok(())
}

/// An SSH server of this test's own, on a port of its own.
struct Sshd {
    child: Child,
    port: u16,
}

impl Sshd {
    fn start(folder: &Path) -> Result<Self> {
        for name in ["host", "user"] {
            let path = folder.join(name);
            let made = Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-f"])
                .arg(&path)
                .status()?;
            ensure!(made.success(), "ssh-keygen failed");
        }
        std::fs::copy(folder.join("user.pub"), folder.join("authorized"))?;
        std::fs::set_permissions(folder.join("authorized"), std::fs::Permissions::from_mode(0o600))?;
        // Nobody can promise that it stays free, but nobody is likely to take it.
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let config = format!(
            "ListenAddress 0.0.0.0:{port}\nHostKey {0}/host\nAuthorizedKeysFile {0}/authorized\n\
             PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nSubsystem sftp internal-sftp\n",
            folder.display()
        );
        let path = folder.join("sshd_config");
        std::fs::write(&path, config)?;
        // Where it goes to be safe from its own clients; Debian makes it with the service, which does not run here.
        std::fs::create_dir_all("/run/sshd").ok();
        let child = Command::new("/usr/sbin/sshd")
            .args(["-D", "-e", "-f"])
            .arg(&path)
            .stdin(Stdio::null())
            .stderr(std::fs::File::create(folder.join("sshd.log"))?)
            .spawn()
            .context("sshd: 'make deps' installs it")?;
        let server = Self { child, port };
        wait_until(
            LIMIT,
            "sshd to listen",
            || Ok(std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()),
        )?;
        Ok(server)
    }
}

fn manager_address(cluster: &Cluster) -> Result<String> {
    let config = std::fs::read_to_string(cluster.dir().join("client.toml"))?;
    let rest = config.split_once("https://").context("no URL of the manager")?.1;
    Ok(rest.split_once(':').context("no port of the manager")?.0.to_owned())
}

impl Drop for Sshd {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn backups_go_over_ssh_to_a_machine_that_is_known_and_no_other() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let server = Sshd::start(folder.path())?;
    let place = tempfile::tempdir()?;
    let cluster = up(place.path(), 1)?;
    guest_in(&cluster, "books", Pool::Shared)?;
    let at = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(at("password"), PASSWORD)?;
    // Run by root, the hosts of such a cluster have networks of their own: they reach this machine where its manager is.
    let machine = manager_address(&cluster)?;
    let host_key = std::fs::read_to_string(at("host.pub"))?;
    std::fs::write(at("known"), format!("[{machine}]:{} {host_key}", server.port))?;
    let user_key = std::fs::read_to_string(at("user.pub"))?;
    std::fs::write(at("other"), format!("[{machine}]:{} {user_key}", server.port))?;
    let url = format!("sftp://{machine}:{}{}", server.port, at("backups"));
    let create = |known: &str| {
        let words =
            ["repository", "create", "nas", "--url", &url, "--init", "--password-file", &at("password")];
        let more = ["--key-file", &at("user"), "--known-hosts-file", &at(known)];
        cluster.berth.run(&[&words[..], &more].concat())
    };
    let stranger = create("other").err().context("a machine with another key was taken")?.to_string();
    ensure!(stranger.contains("Host key verification failed"), "{stranger}");
    create("known").with_context(|| std::fs::read_to_string(at("sshd.log")).unwrap_or_default())?;
    cluster.berth.run(&["snapshot", "export", "books", "baseline", "--repository", "nas"])?;
    restic(folder.path(), &["check", "--read-data"])?;
    cluster.berth.run(&["snapshot", "import", "default/books", "--repository", "nas", "--name", "again"])?;
    answering(&cluster, "again")?.verify()?;
    cluster.down()
}

/// The process that works on a repository for an agent of this cluster, once there is one.
fn worker_of(cluster: &Cluster) -> Result<Process> {
    let directory = cluster.dir().display().to_string();
    let mut found = None;
    wait_until(LIMIT, "a process that works on the repository", || {
        // Where it may leave things for a moment is its agent's own directory.
        let is_ours = |process: &Process| {
            let environment = std::fs::read(format!("/proc/{}/environ", process.pid)).unwrap_or_default();
            String::from_utf8_lossy(&environment).contains(&directory)
        };
        found = with_words(&["backup-worker"]).into_iter().find(is_ours);
        Ok(found.is_some())
    })?;
    found.context("no process")
}

/// Waits until all hosts are online and nothing is under way.
fn settle(cluster: &Cluster) -> Result<()> {
    wait_until(LIMIT, "everything to settle", || {
        let Ok(hosts) = cluster.berth.attempt(&["host", "list"])? else { return Ok(false) };
        let Ok(operations) = cluster.berth.attempt(&["operation", "list", "--active"])? else {
            return Ok(false);
        };
        let online = hosts.as_array().into_iter().flatten().all(|host| host["state"] == "online");
        let items = operations.as_array().or_else(|| operations["items"].as_array());
        Ok(online && items.is_some_and(Vec::is_empty))
    })
}

/// Asks for something, and kills what is named, after so many milliseconds; none: what works on the repository.
fn killed_while(cluster: &Cluster, words: &[&str], victim: Option<&str>, after_ms: u64) -> Result<()> {
    cluster.berth.run(&[words, &["--no-wait"]].concat())?;
    match victim {
        Some(name) => {
            std::thread::sleep(Duration::from_millis(after_ms));
            cluster.daemon(name)?.kill()?;
            cluster.restart_dead()?;
        }
        None => worker_of(cluster)?.kill()?,
    }
    settle(cluster).with_context(|| format!("{words:?} with {victim:?} killed after {after_ms} ms"))
}

const KILLS: [(Option<&str>, u64); 9] = [
    (None, 0),
    (Some("manager"), 0),
    (Some("manager"), 400),
    (Some("manager"), 1500),
    (Some("h1"), 0),
    (Some("h1"), 200),
    (Some("h1"), 600),
    (Some("h1"), 1200),
    (Some("h1"), 2500),
];

#[test]
fn whoever_is_killed_a_backup_is_whole_or_not_there_and_so_is_its_vm() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let place = tempfile::tempdir()?;
    let cluster = up(place.path(), 1)?;
    let guest = guest_in(&cluster, "books", Pool::Shared)?;
    guest.probe.write(5)?;
    known(&cluster, folder.path(), &["--init"])?;
    let pools = place.path().join("cluster/pools");
    let backups = || -> Result<usize> {
        let listed = cluster.berth.run(&["repository", "snapshots", "offsite"])?;
        Ok(listed.as_array().or_else(|| listed["backups"].as_array()).map_or(0, Vec::len))
    };
    for (number, (victim, after_ms)) in KILLS.into_iter().enumerate() {
        let name = format!("kept-{number}");
        cluster.berth.run(&["snapshot", "create", "books", "--name", &name])?;
        let before = backups()?;
        let export = ["snapshot", "export", "books", &name, "--repository", "offsite"];
        killed_while(&cluster, &export, victim, after_ms)?;
        let added = backups()? - before;
        eprintln!("export {number}, {victim:?} killed after {after_ms} ms: {added} added");
        ensure!(added <= 1 && !any_staged(&pools)?, "{added} backups, or something staged");
    }
    cluster.berth.run(&["snapshot", "export", "books", "kept-0", "--repository", "offsite"])?;
    restic(folder.path(), &["unlock"])?;
    restic(folder.path(), &["check", "--read-data"])?;
    ensure!(guest.verify()?.files == 5, "exports do nothing to the VM");
    for (number, (victim, after_ms)) in KILLS.into_iter().enumerate() {
        let name = format!("again-{number}");
        let import =
            ["snapshot", "import", "default/books/kept-0", "--repository", "offsite", "--name", &name];
        killed_while(&cluster, &import, victim, after_ms)?;
        let made = cluster.vm(&name).is_ok();
        eprintln!("import {number}, {victim:?} killed after {after_ms} ms: {made}");
        if made {
            ensure!(answering(&cluster, &name)?.verify()?.files == 5, "{name} is not what was kept");
            cluster.berth.run(&["vm", "delete", &name, "--force"])?;
        }
        ensure!(!any_staged(&pools)?, "something is left staged");
    }
    cluster.down()
}
