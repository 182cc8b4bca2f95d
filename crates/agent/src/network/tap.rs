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

/// What a tap's address begins with: the highest byte of a unicast address that no vendor has.
const ADDRESS_START: u8 = 0xfe;

/// A tap that is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The device's name.
    pub name: String,
    /// The bridge that it is to be on.
    pub bridge: String,
    /// The user that QEMU runs as.
    pub owner: Option<u32>,
}

/// A tap that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// A step failed.
    #[error("{doing} failed for tap '{name}' on bridge '{bridge}'")]
    Step {
        /// What was being done.
        doing: &'static str,
        /// The tap's name.
        name: String,
        /// The bridge's name.
        bridge: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl TapError {
    /// Whether another process has a device of this name, as one that is ending still may.
    pub fn is_busy(&self) -> bool {
        let Self::Step { source, .. } = self;
        source.raw_os_error() == Some(libc::EBUSY)
    }
}

/// Makes a tap, up and on its bridge; it is gone when the last descriptor of it is closed.
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
    let mtu = interface(&socket, libc::SIOCGIFMTU, &request.bridge, Value::None)
        .map_err(failed("finding the bridge"))?;
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
    interface(&socket, ADD_TO_BRIDGE, &request.bridge, Value::Int(index))
        .map_err(failed("putting it on the bridge"))?;
    interface(&socket, libc::SIOCSIFFLAGS, &request.name, Value::Flags(libc::IFF_UP))
        .map_err(failed("bringing it up"))?;
    Ok(tap.into())
}

fn make(request: &Request) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
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

    use super::{Request, open};

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
                let request = Request { name: format!("t{number}"), bridge: "br0".to_owned(), owner: None };
                let _tap = open(&request).expect("a tap");
                let during = ip("-o link show br0");
                assert!(during.contains("fc:ff:ff:ff:ff:ff"), "{during}");
            }
        };
        std::thread::spawn(look).join().expect("looked");
    }
}
