//! Making a tap device and putting it on a bridge.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// `SIOCBRADDIF`, which has no name in the library.
const ADD_TO_BRIDGE: libc::Ioctl = 0x89a2;

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

/// What goes into a request about an interface.
enum Value {
    None,
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
