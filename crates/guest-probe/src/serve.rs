//! Connects a probe to the world: UDP datagrams and the lines of a virtio-serial port.
//!
//! The port belongs to whoever manages the guest from its host: it needs no network. The probe writes an event
//! line there when it is ready and one every second after that, and takes the same requests as over UDP. A port
//! to which nobody listens blocks its writer, so writing has a thread of its own behind a short queue: events are
//! left out while the queue is not empty, and whoever attaches late sees the present and not an hour of past.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use crate::engine::Probe;
use crate::protocol::MOST_REQUEST_BYTES;

/// Lines that may wait for the port's reader.
const MOST_WAITING: usize = 64;

/// Answers datagrams for ever on a thread of its own; returns the address that it is bound to.
///
/// # Errors
/// When the address can't be bound.
pub fn udp(probe: &Arc<Probe>, listen: SocketAddr) -> io::Result<SocketAddr> {
    let socket = Arc::new(UdpSocket::bind(listen)?);
    let bound = socket.local_addr()?;
    let probe = Arc::clone(probe);
    thread::Builder::new().name("udp".into()).spawn(move || answer_datagrams(&probe, &socket))?;
    Ok(bound)
}

fn answer_datagrams(probe: &Probe, socket: &Arc<UdpSocket>) {
    let mut buffer = [0; MOST_REQUEST_BYTES + 1];
    loop {
        // Errors here are about an earlier datagram that could not be delivered: the next one may be.
        let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
        let way_back = Arc::clone(socket);
        probe.handle(
            &buffer[..length],
            Box::new(move |reply| {
                // A reply that is lost is asked for again.
                let _ = way_back.send_to(reply.as_bytes(), from);
            }),
        );
    }
}

/// Serves the virtio-serial port of this name, when the machine has one, and says on it that the probe is ready.
/// Returns whether there is such a port.
///
/// # Errors
/// When the port can't be opened.
pub fn port(probe: &Arc<Probe>, name: &str) -> io::Result<bool> {
    let Some(path) = find_port(Path::new("/"), name) else { return Ok(false) };
    let port = File::options().read(true).write(true).open(path)?;
    serve_port(probe, port)?;
    Ok(true)
}

fn serve_port(probe: &Arc<Probe>, port: File) -> io::Result<()> {
    let lines = start_writer(port.try_clone()?)?;
    lines.send(probe.event("ready"));
    let (events, beating) = (lines.clone(), Arc::clone(probe));
    thread::Builder::new().name("events".into()).spawn(move || {
        loop {
            thread::sleep(Duration::from_secs(1));
            if events.waiting.load(SeqCst) == 0 {
                events.send(beating.event("tick"));
            }
        }
    })?;
    let probe = Arc::clone(probe);
    thread::Builder::new().name("port".into()).spawn(move || read_port(&probe, port, &lines)).map(drop)
}

/// The queue to the port's writer and how many lines it has not yet written.
#[derive(Clone)]
struct Lines {
    queue: SyncSender<String>,
    waiting: Arc<AtomicUsize>,
}

impl Lines {
    fn send(&self, line: String) {
        self.waiting.fetch_add(1, SeqCst);
        if self.queue.try_send(line).is_err() {
            self.waiting.fetch_sub(1, SeqCst);
        }
    }
}

fn start_writer(mut port: File) -> io::Result<Lines> {
    let (queue, lines) = sync_channel::<String>(MOST_WAITING);
    let waiting = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&waiting);
    thread::Builder::new().name("port-writer".into()).spawn(move || {
        for line in lines {
            // Whoever went away before the line was written asks again when it is back.
            let _ = port.write_all(format!("{line}\n").as_bytes());
            count.fetch_sub(1, SeqCst);
        }
    })?;
    Ok(Lines { queue, waiting })
}

fn read_port(probe: &Probe, mut port: File, lines: &Lines) {
    let mut splitter = Splitter::default();
    let mut buffer = [0; 1024];
    loop {
        match port.read(&mut buffer) {
            // The kernel says so, without waiting, as long as nobody is attached to the other end.
            Ok(0) | Err(_) => thread::sleep(Duration::from_millis(100)),
            Ok(length) => splitter.take(&buffer[..length], |line| {
                let lines = lines.clone();
                probe.handle(line, Box::new(move |reply| lines.send(reply.to_owned())));
            }),
        }
    }
}

/// Cuts a stream into lines; one that is too long is handed on once, cut short, so that its sender gets an error.
#[derive(Default)]
struct Splitter {
    line: Vec<u8>,
}

impl Splitter {
    fn take(&mut self, bytes: &[u8], mut each: impl FnMut(&[u8])) {
        for byte in bytes {
            if *byte != b'\n' {
                // One byte more than a request may have, so that it is refused as too long.
                if self.line.len() <= MOST_REQUEST_BYTES {
                    self.line.push(*byte);
                }
                continue;
            }
            if !self.line.trim_ascii().is_empty() {
                each(&self.line);
            }
            self.line.clear();
        }
    }
}

/// The device file of the virtio-serial port of this name, below the given root.
fn find_port(root: &Path, name: &str) -> Option<PathBuf> {
    let class = root.join("sys/class/virtio-ports");
    for entry in fs::read_dir(class).ok()?.flatten() {
        let Ok(found) = fs::read_to_string(entry.path().join("name")) else { continue };
        if found.trim_end() == name {
            return Some(root.join("dev").join(entry.file_name()));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_wherever_the_reads_fall() {
        let text = b"tick 1\r\n\n  \nstatus 2\nrest";
        for step in 1..text.len() {
            let (mut splitter, mut found) = (Splitter::default(), Vec::new());
            for piece in text.chunks(step) {
                splitter.take(piece, |line| found.push(line.trim_ascii().to_vec()));
            }
            assert_eq!(found, [b"tick 1".to_vec(), b"status 2".to_vec()], "step {step}");
        }
    }

    #[test]
    fn an_endless_line_takes_no_memory_and_is_refused_once() {
        let (mut splitter, mut found) = (Splitter::default(), Vec::new());
        for _ in 0..1000 {
            splitter.take(&[b'x'; 1024], |line| found.push(line.len()));
        }
        splitter.take(b"\ntick 1\n", |line| found.push(line.len()));
        assert_eq!(found, [MOST_REQUEST_BYTES + 1, 6]);
    }

    #[test]
    fn the_port_is_found_by_its_name() {
        let root = tempfile::tempdir().expect("a temporary directory");
        for (port, name) in [("vport1p1", "org.qemu.guest_agent.0\n"), ("vport1p2", "dev.berth.probe\n")] {
            let directory = root.path().join("sys/class/virtio-ports").join(port);
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join("name"), name).unwrap();
        }
        let found = find_port(root.path(), "dev.berth.probe");
        assert_eq!(found, Some(root.path().join("dev/vport1p2")));
        assert_eq!(find_port(root.path(), "dev.berth"), None);
    }
}
