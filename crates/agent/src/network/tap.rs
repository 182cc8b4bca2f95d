//! Making a tap device and putting it on a bridge.
//!
//! A bridge whose address nobody has set takes the lowest of its ports' addresses. A tap with a random one can so change
//! the address of the host itself, and neighbours then send to the old one until they ask again: half a minute in which
//! the host, and whatever is on its way to it, is cut off whenever a VM comes or goes. So a tap's address begins with
//! the highest byte that an address of one device may begin with.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// `SIOCBRADDIF`, which has no name in the library.
const ADD_TO_BRIDGE: libc::Ioctl = 0x89a2;

/// `TUNSETQUEUE`, which has no name in the library.
const SET_QUEUE: libc::Ioctl = 0x4004_54d9;
const ATTACH_QUEUE: libc::c_int = 0x0200;
const DETACH_QUEUE: libc::c_int = 0x0400;

/// What a tap's address begins with: the highest byte of a unicast address that no vendor has.
const ADDRESS_START: u8 = 0xfe;

/// A tap that is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The device's name.
    pub name: String,
    /// The bridge that it is to be on; none: it leads nowhere.
    pub bridge: Option<String>,
    /// The user that QEMU runs as.
    pub owner: Option<u32>,
}

/// A tap that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// A step failed.
    #[error("{doing} failed for tap '{name}'{}", bridge.as_ref().map(|bridge| format!(" on bridge '{bridge}'")).unwrap_or_default())]
    Step {
        /// What was being done.
        doing: &'static str,
        /// The tap's name.
        name: String,
        /// The bridge's name.
        bridge: Option<String>,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl TapError {
    /// Whether another process has a device of this name, as one that is ending still may.
    pub fn is_busy(&self) -> bool {
        let Self::Step { source, .. } = self;
        // The second is said of a device that was made with one queue alone.
        matches!(source.raw_os_error(), Some(libc::EBUSY | libc::EINVAL))
    }
}

/// Makes a tap, up and on its bridge if it has one; it is gone when the last descriptor of it is closed.
///
/// # Errors
/// The step that failed; there is then no tap.
pub fn open(request: &Request) -> Result<OwnedFd, TapError> {
    let failed = |doing: &'static str| {
        move |source: io::Error| TapError::Step {
            doing,
            name: request.name.clone(),
            bridge: request.bridge.clone(),
            source,
        }
    };
    let tap = make(request).map_err(failed("making it"))?;
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .map_err(|error| failed("opening a socket")(error.into()))?;
    let Some(bridge) = &request.bridge else {
        interface(&socket, libc::SIOCSIFFLAGS, &request.name, Value::Flags(libc::IFF_UP))
            .map_err(failed("bringing it up"))?;
        return Ok(tap.into());
    };
    let mtu =
        interface(&socket, libc::SIOCGIFMTU, bridge, Value::None).map_err(failed("finding the bridge"))?;
    // SAFETY: `SIOCGIFMTU` has just filled this field in.
    #[allow(unsafe_code)]
    let mtu = unsafe { mtu.ifr_ifru.ifru_mtu };
    // A tap with another length than its bridge's would change that of the whole bridge.
    interface(&socket, libc::SIOCSIFMTU, &request.name, Value::Int(mtu))
        .map_err(failed("setting its frame length"))?;
    raise_address(&socket, &request.name).map_err(failed("setting its address"))?;
    let index =
        interface(&socket, libc::SIOCGIFINDEX, &request.name, Value::None).map_err(failed("finding it"))?;
    // SAFETY: `SIOCGIFINDEX` has just filled this field in.
    #[allow(unsafe_code)]
    let index = unsafe { index.ifr_ifru.ifru_ifindex };
    interface(&socket, ADD_TO_BRIDGE, bridge, Value::Int(index))
        .map_err(failed("putting it on the bridge"))?;
    interface(&socket, libc::SIOCSIFFLAGS, &request.name, Value::Flags(libc::IFF_UP))
        .map_err(failed("bringing it up"))?;
    Ok(tap.into())
}

/// Opens a tap that another process of the same VM has, without taking a frame from it until [`take_frames`].
///
/// # Errors
/// When there is none, or it was made with one queue alone.
pub fn open_beside(request: &Request) -> io::Result<OwnedFd> {
    let tap = make(request)?;
    set_queue(&tap, DETACH_QUEUE)?;
    Ok(tap.into())
}

/// Has the tap's frames come to this descriptor.
///
/// # Errors
/// When the system refuses.
pub fn take_frames(tap: &OwnedFd) -> io::Result<()> {
    set_queue(tap, ATTACH_QUEUE)
}

fn set_queue(tap: &impl AsRawFd, what: libc::c_int) -> io::Result<()> {
    interface(tap, SET_QUEUE, "", Value::Flags(what)).map(drop)
}

fn make(request: &Request) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    // More than one queue, so that a process that is made ready for a restore can have one beside the present one's.
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
    interface(&file, libc::TUNSETIFF, &request.name, Value::Flags(flags))?;
    if let Some(owner) = request.owner {
        // SAFETY: `TUNSETOWNER` takes a number and touches no memory.
        #[allow(unsafe_code)]
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOWNER, libc::c_ulong::from(owner)) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(file)
}

/// Gives a tap, before it is on its bridge, an address above those of the bridge's other ports.
fn raise_address(socket: &OwnedFd, name: &str) -> io::Result<()> {
    let found = interface(socket, libc::SIOCGIFHWADDR, name, Value::None)?;
    // SAFETY: `SIOCGIFHWADDR` has just filled this field in.
    #[allow(unsafe_code)]
    let mut address = unsafe { found.ifr_ifru.ifru_hwaddr };
    address.sa_data[0] = libc::c_char::from_ne_bytes([ADDRESS_START]);
    interface(socket, libc::SIOCSIFHWADDR, name, Value::Address(address)).map(drop)
}

/// What goes into a request about an interface.
enum Value {
    None,
    Address(libc::sockaddr),
    Int(libc::c_int),
    Flags(libc::c_int),
}

/// Asks the kernel about an interface, or tells it.
fn interface(
    descriptor: &impl AsRawFd,
    what: libc::Ioctl,
    name: &str,
    value: Value,
) -> io::Result<libc::ifreq> {
    let bytes = CString::new(name)?;
    let bytes = bytes.as_bytes_with_nul();
    // SAFETY: `ifreq` is plain numbers, for which all zeros are a value.
    #[allow(unsafe_code)]
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if bytes.len() > request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the name is too long"));
    }
    for (place, &byte) in request.ifr_name.iter_mut().zip(bytes) {
        *place = libc::c_char::from_ne_bytes([byte]);
    }
    match value {
        Value::None => {}
        Value::Address(address) => request.ifr_ifru.ifru_hwaddr = address,
        Value::Int(number) => request.ifr_ifru.ifru_ifindex = number,
        Value::Flags(flags) => {
            request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags)
                .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "flags out of range"))?;
        }
    }
    // SAFETY: every request that this is called with takes a pointer to an `ifreq`, reads and writes no more than that,
    // and does not keep it.
    #[allow(unsafe_code)]
    let result = unsafe { libc::ioctl(descriptor.as_raw_fd(), what, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(request) }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use std::os::fd::OwnedFd;

    use super::{Request, open, open_beside, take_frames};

    fn ip(line: &str) -> String {
        let output = Command::new("ip").args(line.split_whitespace()).output().expect("ip runs");
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    }

    #[test]
    fn a_tap_that_comes_leaves_the_bridges_address_alone() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: it needs root");
            return;
        }
        // In a network of its own, which goes with the thread.
        let look = || {
            // Deprecated because some of its flags are not safe; this one is.
            #[allow(deprecated)]
            rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET).expect("a network of our own");
            ip("link add br0 type bridge");
            // The highest that a vendor could have.
            ip("link add port address fc:ff:ff:ff:ff:ff type veth peer name far");
            ip("link set port master br0 up");
            let before = ip("-o link show br0");
            assert!(before.contains("fc:ff:ff:ff:ff:ff"), "{before}");
            for number in 0..8 {
                let request =
                    Request { name: format!("t{number}"), bridge: Some("br0".to_owned()), owner: None };
                let _tap = open(&request).expect("a tap");
                let during = ip("-o link show br0");
                assert!(during.contains("fc:ff:ff:ff:ff:ff"), "{during}");
            }
        };
        std::thread::spawn(look).join().expect("looked");
    }

    /// How many frames are waiting in a tap.
    fn waiting(tap: &OwnedFd) -> usize {
        use std::os::fd::AsFd;
        let mut frame = [0; 2048];
        let flags = rustix::fs::fcntl_getfl(tap).expect("flags");
        rustix::fs::fcntl_setfl(tap, flags | rustix::fs::OFlags::NONBLOCK).expect("flags");
        std::iter::from_fn(|| rustix::io::read(tap.as_fd(), &mut frame).ok()).count()
    }

    #[test]
    fn frames_go_to_the_one_before_until_the_next_takes_them() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: it needs root");
            return;
        }
        let look = || {
            // Deprecated because some of its flags are not safe; this one is.
            #[allow(deprecated)]
            rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET).expect("a network of our own");
            ip("link add br0 type bridge");
            ip("address add 198.18.0.1/24 dev br0");
            ip("link set br0 up");
            let request = Request { name: "t0".to_owned(), bridge: Some("br0".to_owned()), owner: None };
            let before = open(&request).expect("a tap");
            let next = open_beside(&request).expect("a queue more");
            let send = || {
                let socket = std::net::UdpSocket::bind("198.18.0.1:0").expect("socket");
                socket.set_broadcast(true).expect("broadcast");
                for port in 1000..1032 {
                    socket.send_to(b"x", ("198.18.0.255", port)).expect("sent");
                }
            };
            send();
            assert!(waiting(&before) >= 32 && waiting(&next) == 0, "the one before has them all");
            drop(before);
            take_frames(&next).expect("taken");
            send();
            assert!(waiting(&next) >= 32, "the device is still on its bridge, and the next one has them");
        };
        std::thread::spawn(look).join().expect("looked");
    }
}
