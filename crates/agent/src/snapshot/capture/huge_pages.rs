//! Making a guest's memory one of large pages again.
//!
//! What write-protecting memory takes goes by the entries of the page table, with the guest standing still: 150,000 small
//! pages take 35 ms, the same memory in large ones less than one. QEMU asks for large pages, but each page that a
//! background snapshot follows is made small, and the kernel is in no hurry to put them together again. So that is asked
//! for before the next one, while the guest runs.
//!
//! A guest must not come to occupy more of the host by it. What it has not touched is the kernel's one page of zeros, many
//! times, and put together it would become memory of its own: so only parts of which the guest has most are.
//!
//! Nothing depends on it: a kernel that can't (before 6.1, or without large pages) costs a longer pause.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;

use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// `MADV_COLLAPSE` of Linux 6.1 and later.
const COLLAPSE: libc::c_int = 25;
/// A large page.
const LARGE_BYTES: u64 = 2 << 20;
const PAGE_BYTES: u64 = 4096;
/// The small pages in a large one.
const SMALL_PAGES: usize = (LARGE_BYTES / PAGE_BYTES) as usize;
/// How many of them must be the guest's own. Fewer: the host gives away more memory than it gains in time.
const OWN_PAGES: usize = SMALL_PAGES / 4 * 3;
/// In a line of `pagemap`: the page is present, and which it is.
const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;

/// Puts the pages of the process's mapping of this length together, as far as that goes; how many large ones there are
/// then. Blocks.
///
/// # Errors
/// When there is no such mapping, or the kernel has no such service.
pub fn collapse(pid: i32, length: u64) -> io::Result<usize> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let (start, end) =
        maps.lines().find_map(|line| anonymous(line, length)).ok_or(io::ErrorKind::NotFound)?;
    let process = pidfd_open(Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?, PidfdFlags::empty())?;
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let zero = frame_of_zeros()?;
    let (mut entries, mut large) = ([0; SMALL_PAGES * 8], 0);
    let mut at = start.next_multiple_of(LARGE_BYTES);
    while at + LARGE_BYTES <= end {
        pagemap.read_exact_at(&mut entries, at / PAGE_BYTES * 8)?;
        if own_pages(&entries, zero) >= OWN_PAGES && advise(&process, at)? {
            large += 1;
        }
        at += LARGE_BYTES;
    }
    Ok(large)
}

/// Start and end of a private mapping of no file that is this long.
fn anonymous(line: &str, length: u64) -> Option<(u64, u64)> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    let (start, end) = (number(start)?, number(end)?);
    let is_private = words.next() == Some("rw-p");
    // Offset, device, number; and then no name.
    let is_of_no_file = words.nth(2) == Some("0") && words.next().is_none();
    (is_private && is_of_no_file && end - start == length).then_some((start, end))
}

/// How many of these lines of `pagemap` are of pages that are there and are not the one of zeros.
fn own_pages(entries: &[u8], zero: u64) -> usize {
    let (entries, _) = entries.as_chunks();
    let is_own = |entry: &&[u8; 8]| {
        let entry = u64::from_le_bytes(**entry);
        entry & PRESENT != 0 && entry & FRAME != zero
    };
    entries.iter().filter(is_own).count()
}

/// Where the kernel has its page of zeros: what is read of memory that nobody has written to.
fn frame_of_zeros() -> io::Result<u64> {
    // Larger than a page by one: so one lies in it whole.
    let untouched = vec![0_u8; 2 * PAGE_BYTES as usize];
    let page = (untouched.as_ptr().addr() as u64).next_multiple_of(PAGE_BYTES);
    let inside = usize::try_from(page).map_err(io::Error::other)? - untouched.as_ptr().addr();
    std::hint::black_box(untouched[inside]);
    let mut entry = [0; 8];
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, page / PAGE_BYTES * 8)?;
    Ok(u64::from_le_bytes(entry) & FRAME)
}

/// Asks for one large page; whether there is one.
fn advise(process: impl AsFd, start: u64) -> io::Result<bool> {
    let address = usize::try_from(start).map_err(io::Error::other)?;
    let length = usize::try_from(LARGE_BYTES).map_err(io::Error::other)?;
    let part = libc::iovec { iov_base: std::ptr::without_provenance_mut(address), iov_len: length };
    let (process, no_flags) = (process.as_fd().as_raw_fd(), 0_u32);
    // SAFETY: the address is the other process's and is not followed here; `part` lives as long as the call.
    #[allow(unsafe_code)]
    let result = unsafe {
        libc::syscall(libc::SYS_process_madvise, process, &raw const part, 1_usize, COLLAPSE, no_flags)
    };
    if result != -1 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // Not this part, not now: it says nothing of the next.
        Some(libc::EINVAL | libc::ENOMEM | libc::EAGAIN | libc::EBUSY) => Ok(false),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_memory_is_told_from_other_mappings() {
        let line = "7f0000000000-7f0000200000 rw-p 00000000 00:00 0 ";
        assert_eq!(anonymous(line, 2 << 20), Some((0x7f00_0000_0000, 0x7f00_0020_0000)));
        assert_eq!(anonymous(line, 1 << 20), None);
        for other in [
            "7f0000000000-7f0000200000 rw-p 00000000 fd:00 42   /a/memory.raw",
            "7f0000000000-7f0000200000 rw-s 00000000 00:00 0 ",
            "7f0000000000-7f0000200000 rw-p 00000000 00:00 0   [heap]",
            "nonsense",
        ] {
            assert_eq!(anonymous(other, 2 << 20), None, "{other}");
        }
    }

    #[test]
    fn what_nobody_has_written_to_is_nobodys_own() {
        let zero = 42;
        let entries: Vec<u8> =
            [PRESENT | 7, PRESENT | zero, 7, 0].iter().flat_map(|entry: &u64| entry.to_le_bytes()).collect();
        assert_eq!(own_pages(&entries, zero), 1);
    }
}
