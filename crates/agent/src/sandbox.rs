//! The step between fork and exec: what a program that handles a stranger's data loses before it begins.
//!
//! QEMU and qemu-img read what guests and users wrote, so a fault in them is taken for certain to be found one day. They
//! get a session of their own, no open files but those meant for them, no capability nor any way to one, a user of
//! their own where the agent is root, and no core dumps (guest memory would be in them).

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::io::FdFlags;
use rustix::process::{Resource, Rlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};

/// Highest capability that is tried to be taken away. The kernel has 41 today and says so when there is no such one.
const CAPABILITY_MAX: libc::c_ulong = 63;

/// What a program may use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    /// CPU time in seconds.
    pub cpu_s: Option<u64>,
    /// Address space in bytes.
    pub memory_bytes: Option<u64>,
    /// The largest file it may write, in bytes.
    pub file_bytes: Option<u64>,
}

/// As whom a program runs, and with what.
#[derive(Debug, Clone, Default)]
pub struct Confinement {
    /// User and group; none: as the agent.
    pub user_id: Option<u32>,
    /// Further groups, for devices that it has to open. Only with a user.
    pub groups: Vec<u32>,
    /// What it may use.
    pub limits: Limits,
}

/// Makes `command` start so confined, with these files open in it under the numbers that they have here. The files are
/// held as long as the command is.
pub fn confine(command: &mut Command, confinement: Confinement, files: Vec<OwnedFd>) {
    command.env_clear().current_dir("/").stdin(Stdio::null());
    let groups: Vec<rustix::fs::Gid> =
        confinement.groups.iter().map(|&group| rustix::fs::Gid::from_raw(group)).collect();
    let step = move || {
        keep_only(&files)?;
        rustix::process::setsid()?;
        limit(Resource::Core, Some(0))?;
        limit(Resource::Cpu, confinement.limits.cpu_s)?;
        limit(Resource::As, confinement.limits.memory_bytes)?;
        limit(Resource::Fsize, confinement.limits.file_bytes)?;
        if rustix::process::geteuid().is_root() {
            drop_bounding_set();
        }
        if let Some(id) = confinement.user_id {
            become_user(id, &groups)?;
        }
        drop_capabilities()?;
        rustix::thread::set_no_new_privs(true)
    };
    // SAFETY: between fork and exec only functions that are safe in a signal handler may be called. `step` makes system
    // calls and nothing else: what it needs was allocated before the fork, it allocates nothing, takes no lock, and
    // its errors are plain numbers.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(move || step().map_err(io::Error::from));
    }
}

/// Closes, at the exec, every file but the three standard ones and these.
fn keep_only(files: &[OwnedFd]) -> rustix::io::Result<()> {
    // SAFETY: `close_range` with this flag touches no memory, and closes nothing now.
    #[allow(unsafe_code)]
    let result = unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if result != 0 {
        return Err(last_error());
    }
    for file in files {
        rustix::io::fcntl_setfd(file, FdFlags::empty())?;
    }
    Ok(())
}

fn limit(resource: Resource, most: Option<u64>) -> rustix::io::Result<()> {
    match most {
        Some(_) => rustix::process::setrlimit(resource, Rlimit { current: most, maximum: most }),
        None => Ok(()),
    }
}

/// Takes away for good what a program could get back by executing another.
fn drop_bounding_set() {
    for capability in 0..=CAPABILITY_MAX {
        // SAFETY: this `prctl` takes a number and touches no memory. One that is not allowed or not known is refused,
        // and then it could not be used either: `no_new_privs` stands before it.
        #[allow(unsafe_code)]
        unsafe {
            libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0);
        }
    }
}

fn become_user(id: u32, groups: &[rustix::fs::Gid]) -> rustix::io::Result<()> {
    let (user, group) = (rustix::fs::Uid::from_raw(id), rustix::fs::Gid::from_raw(id));
    rustix::thread::set_thread_groups(groups)?;
    rustix::thread::set_thread_res_gid(group, group, group)?;
    rustix::thread::set_thread_res_uid(user, user, user)
}

fn drop_capabilities() -> rustix::io::Result<()> {
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    rustix::thread::set_capabilities(None, sets)
}

fn last_error() -> rustix::io::Errno {
    let number = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL);
    rustix::io::Errno::from_raw_os_error(number)
}

/// Whether this process may become the users from `first` on: it is root, and they exist in its user namespace.
pub fn can_become_users_from(first: u32) -> bool {
    if !rustix::process::geteuid().is_root() {
        return false;
    }
    let mapped = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    mapped.lines().any(|line| {
        let mut numbers = line.split_whitespace().map_while(|word| word.parse::<u64>().ok());
        let (Some(inside), Some(_), Some(count)) = (numbers.next(), numbers.next(), numbers.next()) else {
            return false;
        };
        // Room for a million VMs: whoever has fewer users mapped has them for something else.
        inside <= u64::from(first) && u64::from(first) + 1_000_000 <= inside + count
    })
}

/// The group that a device belongs to, for programs that have to open it.
pub fn group_of(device: &Path) -> Option<u32> {
    use std::os::unix::fs::MetadataExt;
    File::open(device).ok()?.metadata().ok().map(|metadata| metadata.gid())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn status_of_child(confinement: Confinement) -> String {
        let mut command = Command::new("/bin/cat");
        command.arg("/proc/self/status").stdout(Stdio::piped());
        confine(&mut command, confinement, Vec::new());
        let mut child = command.spawn().expect("spawned");
        let mut text = String::new();
        child.stdout.take().expect("pipe").read_to_string(&mut text).expect("read");
        assert!(child.wait().expect("wait").success());
        text
    }

    fn line<'a>(status: &'a str, key: &str) -> Vec<&'a str> {
        let line = status.lines().find_map(|line| line.strip_prefix(key)).expect(key);
        line.split_whitespace().collect()
    }

    #[test]
    fn a_confined_program_has_no_capability_and_no_way_to_one() {
        let status = status_of_child(Confinement::default());
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
            assert_eq!(line(&status, set), ["0000000000000000"], "{set}");
        }
        assert_eq!(line(&status, "NoNewPrivs:"), ["1"]);
        if rustix::process::geteuid().is_root() {
            assert_eq!(line(&status, "CapBnd:"), ["0000000000000000"]);
        }
    }

    #[test]
    fn a_confined_program_of_root_is_another_user_in_no_group_of_roots() {
        if !can_become_users_from(2_000_000) {
            return;
        }
        let confinement = Confinement { user_id: Some(2_000_001), ..Confinement::default() };
        let status = status_of_child(confinement);
        assert_eq!(line(&status, "Uid:"), ["2000001"; 4]);
        assert_eq!(line(&status, "Gid:"), ["2000001"; 4]);
        assert!(line(&status, "Groups:").is_empty());
    }

    #[test]
    fn a_confined_program_has_only_the_files_that_are_meant_for_it() {
        let meant: OwnedFd = File::open("/dev/null").expect("file").into();
        let leaking = File::open("/dev/zero").expect("file");
        rustix::io::fcntl_setfd(&leaking, FdFlags::empty()).expect("leaks");
        let mut command = Command::new("/bin/ls");
        command.arg("-l").arg("/proc/self/fd").stdout(Stdio::piped()).stderr(Stdio::null());
        confine(&mut command, Confinement::default(), vec![meant]);
        let listed = command.output().expect("ran");
        drop(leaking);
        let text = String::from_utf8(listed.stdout).expect("text");
        assert!(!text.contains("/dev/zero"), "{text}");
        // Standard input and error, and the one that is meant.
        assert_eq!(text.matches("/dev/null").count(), 3, "{text}");
    }
}
