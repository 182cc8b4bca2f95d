//! Holding a guest's processors still from outside QEMU, for a few milliseconds.
//!
//! QEMU stops its guest, and lets it go on, at moments of its own. Whoever needs the guest to stand for a moment longer
//! holds the threads that run its processors, as a debugger would: each is a thread that the kernel can stop alone, while QEMU's
//! others, and so its monitor, go on.
//!
//! **Nothing is left held.** The kernel lets a traced thread go on when its tracer ends, so an agent that is killed holds
//! nobody; and one that is slow lets go by itself after [`HELD_MAX`].

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use berth_qmp::HostTime;
use tokio::sync::oneshot;

/// How long the processors are held at most. Longer: an agent that is itself kept waiting stops guests for as long.
/// Shorter: one that is merely slow has to begin anew.
const HELD_MAX: Duration = Duration::from_secs(1);
/// How long a thread may take to stop.
const STOP_MAX: Duration = Duration::from_millis(200);
/// How often it is looked at meanwhile.
const LOOK_EVERY: Duration = Duration::from_micros(20);

type Answer = oneshot::Sender<io::Result<HostTime>>;

enum Word {
    Hold(Answer),
    Release(Answer),
}

/// Somebody who can hold them; dropped, they are let go.
pub struct Holder {
    words: Sender<Word>,
}

impl Holder {
    /// Stands ready to hold these threads.
    ///
    /// # Errors
    /// When the system has no thread for it.
    pub fn of(threads: Vec<i32>) -> io::Result<Self> {
        let (words, heard) = channel();
        // The kernel takes words about a traced thread from one thread alone.
        std::thread::Builder::new().name("holder".into()).spawn(move || serve(&threads, &heard))?;
        Ok(Self { words })
    }

    /// Holds them; when that was done.
    ///
    /// # Errors
    /// When the kernel does not let us, or one does not stop: then none is held.
    pub async fn hold(&self) -> io::Result<HostTime> {
        self.say(Word::Hold).await
    }

    /// Lets them go; when that was done.
    ///
    /// # Errors
    /// When they had been let go before.
    pub async fn release(self) -> io::Result<HostTime> {
        self.say(Word::Release).await
    }

    async fn say(&self, word: impl FnOnce(Answer) -> Word) -> io::Result<HostTime> {
        let (answer, heard) = oneshot::channel();
        let gone = || io::Error::new(io::ErrorKind::TimedOut, "they were let go before");
        self.words.send(word(answer)).map_err(|_| gone())?;
        heard.await.map_err(|_| gone())?
    }
}

fn serve(threads: &[i32], words: &Receiver<Word>) {
    let Ok(Word::Hold(answer)) = words.recv() else { return };
    let mut held = Vec::new();
    for &thread in threads {
        match stop(thread) {
            Ok(signal) => held.push((thread, signal)),
            Err(error) => {
                release(&held);
                let _ = answer.send(Err(error));
                return;
            }
        }
    }
    let _ = answer.send(Ok(now()));
    let word = words.recv_timeout(HELD_MAX);
    release(&held);
    match word {
        Ok(Word::Release(answer)) => drop(answer.send(Ok(now()))),
        Err(RecvTimeoutError::Timeout) => {
            tracing::warn!("a guest's processors were let go before they should")
        }
        Ok(Word::Hold(_)) | Err(RecvTimeoutError::Disconnected) => {}
    }
}

/// Stops a thread; the signal that was on its way to it, or 0.
fn stop(thread: i32) -> io::Result<i32> {
    request(libc::PTRACE_SEIZE, thread, 0)?;
    request(libc::PTRACE_INTERRUPT, thread, 0)?;
    let begun = Instant::now();
    loop {
        let mut status = 0;
        // SAFETY: `status` is written while the call lasts and not kept.
        #[allow(unsafe_code)]
        let found = unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL | libc::WNOHANG) };
        match found {
            0 if begun.elapsed() < STOP_MAX => std::thread::sleep(LOOK_EVERY),
            0 => return Err(io::Error::new(io::ErrorKind::TimedOut, "a processor's thread does not stop")),
            -1 => return Err(io::Error::last_os_error()),
            _ if !libc::WIFSTOPPED(status) => return Err(io::Error::other("a processor's thread has ended")),
            _ if status >> 16 == libc::PTRACE_EVENT_STOP => return Ok(0),
            _ => return Ok(libc::WSTOPSIG(status)),
        }
    }
}

fn release(held: &[(i32, i32)]) {
    for &(thread, signal) in held {
        if let Err(error) = request(libc::PTRACE_DETACH, thread, signal) {
            tracing::warn!(thread, %error, "a processor's thread can't be let go: it is when this thread ends");
        }
    }
}

fn request(what: libc::c_uint, thread: i32, data: i32) -> io::Result<()> {
    let (address, data) = (std::ptr::null_mut::<libc::c_void>(), libc::c_long::from(data));
    // SAFETY: none of the three requests takes an address, and the number that goes with them is no pointer.
    #[allow(unsafe_code)]
    let result = unsafe { libc::ptrace(what, thread, address, data) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn now() -> HostTime {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    HostTime::from_epoch_us(u64::try_from(now.as_micros()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A program that writes as fast as it is read.
    fn writer() -> Child {
        Command::new("yes").stdout(Stdio::piped()).spawn().expect("yes")
    }

    fn state(pid: u32) -> char {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
        stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()).expect("a state")
    }

    #[tokio::test]
    async fn what_is_held_stands_and_goes_on_when_it_is_let_go_or_the_holder_is_gone() {
        let mut child = writer();
        let pid = i32::try_from(child.id()).expect("a pid");
        let holder = Holder::of(vec![pid]).expect("a holder");
        let held = holder.hold().await.expect("held");
        assert_eq!(state(child.id()), 't');
        let released = holder.release().await.expect("released");
        assert!(released.us_since(held).is_some());
        let mut bytes = [0; 1 << 17];
        child.stdout.as_mut().expect("output").read_exact(&mut bytes).expect("it goes on");

        let holder = Holder::of(vec![pid]).expect("a holder");
        holder.hold().await.expect("held again");
        drop(holder);
        child.stdout.as_mut().expect("output").read_exact(&mut bytes).expect("it goes on");
        child.kill().and_then(|()| child.wait()).expect("ended");
        let gone = Holder::of(vec![pid]).expect("a holder");
        assert!(gone.hold().await.is_err(), "nobody is there to be held");
    }
}
