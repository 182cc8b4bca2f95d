//! A QEMU for a test, and just enough of its protocol; stopped by its process id when dropped.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

/// The guest's memory.
pub const MEMORY_BYTES: u64 = 256 << 20;

/// Longer than anything takes on a slow machine; what waits for it has failed.
const DEADLINE: Duration = Duration::from_secs(60);

pub struct Qemu {
    child: Child,
    directory: tempfile::TempDir,
    /// The monitor is on QEMU's own input and output: when QEMU dies, reading ends at once.
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    firmware: UnixStream,
    events: Vec<Value>,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Qemu {
    /// Starts a machine, its memory mapped from `image` or fresh, that waits for a stream when `incoming`.
    pub fn start(image: Option<&Path>, incoming: bool) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let firmware_log = directory.path().join("firmware");
        let listener = UnixListener::bind(&firmware_log).expect("a socket");
        let program = std::env::var("BERTH_TEST_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".into());
        let memory = match image {
            Some(path) => {
                format!("memory-backend-file,id=pc.ram,size=256M,share=off,mem-path={}", path.display())
            }
            None => "memory-backend-ram,id=pc.ram,size=256M".to_owned(),
        };
        let mut command = Command::new(program);
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg", "-vga", "std"])
            .args(["-machine", "pc-q35-7.2,memory-backend=pc.ram", "-m", "256M", "-object", &memory])
            .args(["-chardev", &format!("socket,id=log,path={}", firmware_log.display())])
            .args(["-device", "isa-debugcon,iobase=0x402,chardev=log", "-qmp", "stdio"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        if incoming {
            command.args(["-incoming", "defer"]);
        }
        let mut child = command.spawn().expect("QEMU is installed");
        let commands = child.stdin.take().expect("piped");
        let mut answers = BufReader::new(child.stdout.take().expect("piped"));
        assert!(read_message(&mut answers).get("QMP").is_some());
        // QEMU connects its devices before it greets.
        let (firmware, _) = listener.accept().expect("QEMU has connected");
        firmware.set_read_timeout(Some(DEADLINE)).expect("settable");
        let mut qemu = Self { child, directory, commands, answers, firmware, events: Vec::new() };
        qemu.call("qmp_capabilities", json!({}));
        let events = json!({"capabilities": [{"capability": "events", "state": true}]});
        qemu.call("migrate-set-capabilities", events);
        qemu
    }

    /// Waits until the firmware has given up booting.
    pub fn wait_for_firmware(&mut self) {
        let mut lines = BufReader::new(self.firmware.try_clone().expect("a duplicate")).lines();
        let done = lines.any(|line| line.expect("text in time").contains("No bootable device"));
        assert!(done, "the firmware has ended early");
    }

    pub fn call(&mut self, command: &str, arguments: Value) -> Value {
        self.try_call(command, arguments).unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    /// The reply, or QEMU's error.
    pub fn try_call(&mut self, command: &str, arguments: Value) -> Result<Value, Value> {
        let line = json!({"execute": command, "arguments": arguments}).to_string();
        self.commands.write_all(line.as_bytes()).expect("QEMU listens");
        loop {
            let message = self.message();
            match (message.get("return"), message.get("error")) {
                (Some(value), _) => return Ok(value.clone()),
                (_, Some(error)) => return Err(error.clone()),
                _ => self.events.push(message),
            }
        }
    }

    pub fn run_state(&mut self) -> String {
        self.call("query-status", json!({}))["status"].as_str().expect("a word").to_owned()
    }

    pub fn wait_for_event(&mut self, name: &str) {
        self.wait_for(|event| event["event"] == name);
    }

    fn wait_for(&mut self, wanted: impl Fn(&Value) -> bool) {
        while !self.events.iter().any(&wanted) {
            let message = self.message();
            self.events.push(message);
        }
    }

    /// Migrates into this process; gives the stream.
    pub fn migrate_away(&mut self) -> Vec<u8> {
        let path = self.directory.path().join("migration");
        let listener = UnixListener::bind(&path).expect("a socket");
        self.call("migrate-set-parameters", json!({"max-bandwidth": 0}));
        self.call("migrate", json!({"uri": format!("unix:{}", path.display())}));
        // It has connected once it is active.
        self.wait_for(|event| migration(event, "active") || migration(event, "failed"));
        assert!(!self.events.iter().any(|event| migration(event, "failed")), "the migration has failed");
        let (mut stream, _) = listener.accept().expect("QEMU has connected");
        stream.set_read_timeout(Some(DEADLINE)).expect("settable");
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).expect("readable");
        self.wait_for_migration();
        bytes
    }

    /// Loads a stream.
    pub fn load(&mut self, stream: &[u8]) {
        let path = self.directory.path().join("migration");
        self.call("migrate-incoming", json!({"uri": format!("unix:{}", path.display())}));
        let mut socket = UnixStream::connect(&path).expect("QEMU listens");
        socket.write_all(stream).expect("QEMU reads");
        drop(socket);
        self.wait_for_migration();
    }

    fn wait_for_migration(&mut self) {
        self.wait_for(|event| migration(event, "completed") || migration(event, "failed"));
        assert!(!self.events.iter().any(|event| migration(event, "failed")), "the migration has failed");
    }

    /// The guest's memory as it sees it from address 0 on.
    pub fn memory(&mut self) -> Vec<u8> {
        let path = self.directory.path().join("memory");
        self.call("pmemsave", json!({"val": 0, "size": MEMORY_BYTES, "filename": path}));
        std::fs::read(path).expect("written")
    }

    fn message(&mut self) -> Value {
        read_message(&mut self.answers)
    }
}

fn migration(event: &Value, status: &str) -> bool {
    event["event"] == "MIGRATION" && event["data"]["status"] == status
}

fn read_message(answers: &mut impl BufRead) -> Value {
    let mut line = String::new();
    answers.read_line(&mut line).expect("QEMU answers");
    serde_json::from_str(&line).unwrap_or_else(|error| panic!("QEMU says {line:?}: {error}"))
}
