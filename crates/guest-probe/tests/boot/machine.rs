//! One QEMU with the test guest, its files and its sockets; it is gone when the value is.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Cursor, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use guest_probe::client::ProbeClient;
use guest_probe::image::GuestImage;
use guest_probe::{PORT_NAME, UDP_PORT};
use serde_json::Value;
use tempfile::TempDir;

const AGENT_PORT: &str = "org.qemu.guest_agent.0";
const DISK_BYTES: u64 = 64 << 20;

/// What the guest is told about its network.
pub enum Seed {
    /// Nothing: it asks a DHCP server.
    None,
    /// A NoCloud disk with this network configuration.
    Disk(&'static str),
}

/// A machine that is off.
pub struct Machine {
    directory: TempDir,
    seeded: bool,
    disk: bool,
}

/// A machine that is on.
pub struct Running {
    machine: Option<Machine>,
    qemu: Child,
    udp: SocketAddr,
    /// The probe's port.
    pub probe: Line,
    /// The guest agent's port.
    pub agent: Line,
    monitor: Line,
}

impl Machine {
    /// A machine with a blank disk.
    pub fn new(seed: Seed) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let disk = File::create(directory.path().join("disk")).expect("a disk");
        disk.set_len(DISK_BYTES).expect("a sparse disk");
        let seeded = matches!(seed, Seed::Disk(_));
        if let Seed::Disk(network) = seed {
            fs::write(directory.path().join("seed"), seed_disk(network)).expect("a seed");
        }
        Self { directory, seeded, disk: true }
    }

    /// The same with something on its disk.
    pub fn with_disk(self, content: &[u8]) -> Self {
        let mut disk = File::options().write(true).open(self.path("disk")).expect("a disk");
        disk.write_all(content).expect("it is written");
        self
    }

    /// The same without its disk.
    pub fn without_disk(self) -> Self {
        Self { disk: false, ..self }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Switches it on.
    pub fn boot(self) -> Running {
        let image = GuestImage::locate().unwrap_or_else(|error| panic!("{error}"));
        let port = free_port();
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-accel", "tcg,thread=multi", "-machine", "q35", "-cpu", "max", "-smp", "1", "-m", "256"])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .arg("-kernel")
            .arg(&image.kernel)
            .arg("-initrd")
            .arg(&image.initrd)
            .args(["-append", &image.cmdline])
            .args(["-serial", &format!("file:{}", self.path("console").display())])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", self.path("qmp").display())])
            .args(["-device", "virtio-serial-pci"]);
        for (id, name) in [("probe", PORT_NAME), ("agent", AGENT_PORT)] {
            let socket = self.path(id);
            let chardev = format!("socket,id={id},path={},server=on,wait=off", socket.display());
            command.args(["-chardev", &chardev]);
            command.args(["-device", &format!("virtserialport,chardev={id},name={name}")]);
        }
        let address = if self.seeded { "10.0.2.77" } else { "" };
        let forward = format!("user,id=net,hostfwd=udp:127.0.0.1:{port}-{address}:{UDP_PORT}");
        command.args(["-netdev", &forward, "-device", "virtio-net-pci,netdev=net,romfile="]);
        for (name, there) in [("disk", self.disk), ("seed", self.seeded)] {
            if there {
                let file = self.path(name);
                let drive = format!("file={},id={name},if=none,format=raw", file.display());
                command.args(["-drive", &drive, "-device", &format!("virtio-blk-pci,drive={name}")]);
            }
        }
        let qemu = command.stdin(Stdio::null()).spawn().expect("qemu-system-x86_64 starts");
        let (probe, agent) = (Line::attach(&self.path("probe")), Line::attach(&self.path("agent")));
        let monitor = Line::attach(&self.path("qmp"));
        monitor.send(r#"{"execute":"qmp_capabilities"}"#);
        let udp = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Running { machine: Some(self), qemu, udp, probe, agent, monitor }
    }
}

impl Running {
    /// A client for its probe.
    pub fn client(&self) -> ProbeClient {
        ProbeClient::new(self.udp).expect("a socket")
    }

    /// Whether QEMU is still there.
    pub fn is_running(&mut self) -> bool {
        self.qemu.try_wait().expect("its state").is_none()
    }

    /// Presses the ACPI power button.
    pub fn press_power_button(&self) {
        self.monitor.send(r#"{"execute":"system_powerdown"}"#);
    }

    /// Waits until the guest has switched itself off.
    pub fn wait_until_off(mut self, within: Duration) -> Machine {
        let end = Instant::now() + within;
        while self.is_running() {
            assert!(Instant::now() < end, "the guest does not switch itself off");
            std::thread::sleep(Duration::from_millis(10));
        }
        self.machine.take().expect("it is taken once")
    }

    /// Whether its disk starts with these bytes.
    pub fn disk_starts_with(&self, expected: &[u8]) -> bool {
        let machine = self.machine.as_ref().expect("it is taken only when off");
        let mut found = vec![0; expected.len()];
        let mut disk = File::open(machine.path("disk")).expect("a disk");
        disk.read_exact(&mut found).expect("its first bytes");
        found == expected
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself; and a test that fails must not fail again here.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        if let Some(machine) = self.machine.as_ref().filter(|_| std::thread::panicking()) {
            let console = fs::read(machine.path("console")).unwrap_or_default();
            eprintln!("the guest's console:\n{}", String::from_utf8_lossy(&console));
        }
    }
}

/// A socket that carries one JSON value a line.
pub struct Line {
    stream: UnixStream,
    values: Receiver<Value>,
}

impl Line {
    fn attach(path: &Path) -> Self {
        let end = Instant::now() + Duration::from_secs(20);
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < end, "{}: {error}", path.display()),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let (sender, values) = channel();
        let reader = BufReader::new(stream.try_clone().expect("a second handle"));
        std::thread::spawn(move || {
            for line in reader.lines().map_while(Result::ok) {
                let value = serde_json::from_str(&line).unwrap_or(Value::Null);
                if sender.send(value).is_err() {
                    return;
                }
            }
        });
        Self { stream, values }
    }

    /// Sends one line.
    pub fn send(&self, line: &str) {
        (&self.stream).write_all(format!("{line}\n").as_bytes()).expect("it is sent");
    }

    /// The next line.
    pub fn line(&self, within: Duration) -> Value {
        self.find(within, |_| true)
    }

    /// The next event of this name.
    pub fn event(&self, name: &str, within: Duration) -> Value {
        self.find(within, |value| value["event"] == name)
    }

    /// The next reply to the request with this id.
    pub fn reply(&self, id: &str, within: Duration) -> Value {
        self.find(within, |value| value["seq"] == id)
    }

    fn find(&self, within: Duration, wanted: impl Fn(&Value) -> bool) -> Value {
        let end = Instant::now() + within;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let value = self.values.recv_timeout(left).expect("a line in time");
            if wanted(&value) {
                return value;
            }
        }
    }
}

fn free_port() -> u16 {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
    socket.local_addr().expect("an address").port()
}

fn seed_disk(network: &str) -> Vec<u8> {
    let mut disk = Cursor::new(vec![0; 1 << 20]);
    let options = fatfs::FormatVolumeOptions::new().volume_label(*b"CIDATA     ");
    fatfs::format_volume(&mut disk, options).expect("a file system");
    {
        let system = fatfs::FileSystem::new(&mut disk, fatfs::FsOptions::new()).expect("a file system");
        let meta = "instance-id: i-1\nlocal-hostname: seeded-1\n";
        for (name, text) in
            [("meta-data", meta), ("user-data", "#cloud-config\n"), ("network-config", network)]
        {
            let mut file = system.root_dir().create_file(name).expect("a file");
            file.write_all(text.as_bytes()).expect("it is written");
        }
    }
    disk.into_inner()
}
