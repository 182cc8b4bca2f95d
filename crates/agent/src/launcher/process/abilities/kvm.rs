//! Whether KVM runs guests: tried, not concluded.
//!
//! A `/dev/kvm` that opens is no proof. In nested and confined machines it may be there, make a VM, and then never execute
//! an instruction of it, or hang. So a guest of five bytes is run, in a child process that can be killed, with a time
//! limit. Nor is that alone a proof: KVM's own emulator can do these five bytes where the CPU can do none, so the CPU
//! must say that it virtualises, too.

use std::io;
use std::path::Path;

/// How long the probe guest may take. It needs microseconds; a machine that swaps needs more.
const TIMEOUT_MS: i32 = 1000;

/// Tries it. Blocks for as long as the time limit.
///
/// # Errors
/// Why KVM is not usable, in a few words.
pub fn probe() -> Result<(), String> {
    if !Path::new("/dev/kvm").exists() {
        return Err("there is no /dev/kvm".to_owned());
    }
    if !cpu_virtualises() {
        return Err("the CPU shows neither vmx nor svm".to_owned());
    }
    run_in_child()
}

fn cpu_virtualises() -> bool {
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    cpus.lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| line.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

/// Runs the probe guest in a child process.
///
/// # Errors
/// As [`probe`].
#[allow(unsafe_code)]
pub fn run_in_child() -> Result<(), String> {
    // SAFETY: the child of a process with threads may only do what is safe in a signal handler. `guest::run` makes
    // system calls on memory of its own stack and of its own mappings, and `_exit` ends it without any clean-up.
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => Err(format!("a process for the probe can't be made: {}", io::Error::last_os_error())),
        0 => {
            let code = guest::run();
            // SAFETY: as above.
            unsafe { libc::_exit(code) }
        }
        child => wait(child),
    }
}

fn wait(child: i32) -> Result<(), String> {
    use rustix::event::{PollFd, PollFlags, poll};
    use rustix::process::{
        Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
    };
    use std::os::fd::AsFd;
    let broke = |error: rustix::io::Errno| format!("the probe of KVM can't be watched: {error}");
    let pid = Pid::from_raw(child).ok_or("the probe of KVM has no number")?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(broke)?;
    let timeout = rustix::event::Timespec { tv_sec: i64::from(TIMEOUT_MS / 1000), tv_nsec: 0 };
    let ended = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)).map_err(broke)? > 0;
    if !ended {
        pidfd_send_signal(&pidfd, Signal::KILL).map_err(broke)?;
        // One that hangs in the kernel is not waited for: it would hang this too.
        let grace = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
        poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&grace)).map_err(broke)?;
    }
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    let status = waitid(WaitId::PidFd(pidfd.as_fd()), options).map_err(broke)?;
    if !ended {
        return Err(format!("a probe guest did not end within {TIMEOUT_MS} ms"));
    }
    match status.and_then(|status| status.exit_status()) {
        Some(0) => Ok(()),
        Some(code) => Err(guest::reason(code).to_owned()),
        None => Err("the process of a probe guest was ended".to_owned()),
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod guest {
    pub(super) fn run() -> i32 {
        1
    }

    pub(super) fn reason(_: i32) -> &'static str {
        "the probe guest is for x86-64 only"
    }
}

/// The guest: it puts a byte out on a port. Between fork and `_exit`, so system calls and plain memory only.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod guest {
    use std::ptr;

    const GET_API_VERSION: libc::c_ulong = 0xae00;
    const CREATE_VM: libc::c_ulong = 0xae01;
    const GET_VCPU_MMAP_SIZE: libc::c_ulong = 0xae04;
    const CREATE_VCPU: libc::c_ulong = 0xae41;
    const SET_USER_MEMORY_REGION: libc::c_ulong = 0x4020_ae46;
    const SET_TSS_ADDRESS: libc::c_ulong = 0xae47;
    const RUN: libc::c_ulong = 0xae80;
    const SET_REGISTERS: libc::c_ulong = 0x4090_ae82;
    const GET_SPECIAL_REGISTERS: libc::c_ulong = 0x8138_ae83;
    const SET_SPECIAL_REGISTERS: libc::c_ulong = 0x4138_ae84;
    const API_VERSION: libc::c_int = 12;
    const EXIT_IO: u32 = 2;

    const PAGE: usize = 4096;
    const ENTRY: u64 = 0x1000;
    const PORT: u16 = 0x10;
    const BYTE: u8 = 0x42;
    /// `mov al, BYTE; out PORT, al; hlt`.
    const CODE: [u8; 5] = [0xb0, BYTE, 0xe6, PORT as u8, 0xf4];

    const WORDS_OF_REGISTERS: usize = 18;
    const INDEX_RIP: usize = 16;
    const INDEX_FLAGS: usize = 17;
    const WORDS_OF_SPECIAL_REGISTERS: usize = 39;
    /// The first word is the code segment's base; its selector is the two bytes after the limit in the second.
    const SELECTOR_MASK: u64 = !(0xffff << 32);

    #[repr(C)]
    struct Region {
        slot: u32,
        flags: u32,
        guest_address: u64,
        length_bytes: u64,
        host_address: u64,
    }

    pub(super) fn reason(code: i32) -> &'static str {
        match code {
            1 => "/dev/kvm can't be opened",
            2 => "/dev/kvm is not the KVM that is known",
            3 => "KVM makes no VM",
            4 => "KVM takes no memory",
            5 => "KVM makes no virtual CPU",
            6 => "KVM does not run a probe guest",
            _ => "a probe guest under KVM did something else than it was told to",
        }
    }

    pub(super) fn run() -> i32 {
        match attempt() {
            Ok(()) => 0,
            Err(code) => code,
        }
    }

    fn attempt() -> Result<(), i32> {
        // SAFETY: each call is given numbers, descriptors that the calls before it gave, and pointers to memory that is
        // as long as KVM's interface says: `Region` and the two arrays of words are laid out as it defines, the
        // mappings are one page and what KVM says a virtual CPU needs. All of it is this process's own, which ends
        // right after; nothing is shared with the agent.
        unsafe {
            let kvm = at_least_zero(libc::open(c"/dev/kvm".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC), 1)?;
            if libc::ioctl(kvm, GET_API_VERSION, 0) != API_VERSION {
                return Err(2);
            }
            let vm = at_least_zero(libc::ioctl(kvm, CREATE_VM, 0), 3)?;
            // Intel's needs three pages of address space for itself; AMD's does not care.
            libc::ioctl(vm, SET_TSS_ADDRESS, 0xfffb_d000_u64);
            let memory = map(-1, PAGE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).ok_or(4)?;
            ptr::copy_nonoverlapping(CODE.as_ptr(), memory, CODE.len());
            let region = Region {
                slot: 0,
                flags: 0,
                guest_address: ENTRY,
                length_bytes: PAGE as u64,
                host_address: memory as u64,
            };
            at_least_zero(libc::ioctl(vm, SET_USER_MEMORY_REGION, &raw const region), 4)?;
            let cpu = at_least_zero(libc::ioctl(vm, CREATE_VCPU, 0), 5)?;
            let length = at_least_zero(libc::ioctl(kvm, GET_VCPU_MMAP_SIZE, 0), 5)?;
            let shared = map(cpu, usize::try_from(length).map_err(|_| 5)?, libc::MAP_SHARED).ok_or(5)?;
            let mut special = [0u64; WORDS_OF_SPECIAL_REGISTERS];
            at_least_zero(libc::ioctl(cpu, GET_SPECIAL_REGISTERS, special.as_mut_ptr()), 5)?;
            special[0] = 0;
            special[1] &= SELECTOR_MASK;
            at_least_zero(libc::ioctl(cpu, SET_SPECIAL_REGISTERS, special.as_ptr()), 5)?;
            let mut registers = [0u64; WORDS_OF_REGISTERS];
            registers[INDEX_RIP] = ENTRY;
            registers[INDEX_FLAGS] = 2;
            at_least_zero(libc::ioctl(cpu, SET_REGISTERS, registers.as_ptr()), 5)?;
            at_least_zero(libc::ioctl(cpu, RUN, 0), 6)?;
            put_out_the_byte(shared)
        }
    }

    /// Whether the guest left because it put the byte out.
    ///
    /// # Safety
    /// `shared` must be the mapping of a virtual CPU that has been run.
    unsafe fn put_out_the_byte(shared: *const u8) -> Result<(), i32> {
        // SAFETY: the mapping is at least a page; the reason is at 8, the port's data from 32 on, with the byte at the
        // offset that stands there, which is checked to be inside the page.
        unsafe {
            let reason = shared.add(8).cast::<u32>().read();
            let port = shared.add(34).cast::<u16>().read();
            let offset = shared.add(40).cast::<u64>().read();
            if reason == EXIT_IO && port == PORT {
                let byte = usize::try_from(offset).ok().filter(|&offset| offset < 2 * PAGE).ok_or(7)?;
                if shared.add(byte).read() == BYTE {
                    return Ok(());
                }
            }
        }
        Err(7)
    }

    /// Maps memory to read and write; none when the system refuses.
    ///
    /// # Safety
    /// A descriptor, if one is given, must be one that may be mapped.
    unsafe fn map(descriptor: libc::c_int, length: usize, flags: libc::c_int) -> Option<*mut u8> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the system's choice lies on nothing.
        let address = unsafe { libc::mmap(ptr::null_mut(), length, protection, flags, descriptor, 0) };
        (address != libc::MAP_FAILED).then_some(address.cast())
    }

    fn at_least_zero(result: libc::c_int, code: i32) -> Result<libc::c_int, i32> {
        if result < 0 { Err(code) } else { Ok(result) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_ends_in_time_whatever_kvm_does() {
        let began = std::time::Instant::now();
        let outcome = run_in_child();
        assert!(began.elapsed() < std::time::Duration::from_secs(4), "{outcome:?}");
        // There are machines whose KVM runs these five bytes by emulation and no ordinary guest: the CPU's word counts too.
        if !cpu_virtualises() {
            assert!(probe().is_err());
        }
    }
}
