//! What of a console's output was shown already.
//!
//! Whoever attaches gets the last of what the console showed first. After a lost connection most of that is on the
//! terminal already; showing it twice would look as if the guest had done everything twice.

/// How much of what was shown is remembered: enough to be found again for certain, small enough to search at once.
const REMEMBERED_BYTES: usize = 4096;
/// Shorter, and a prompt alone would match anywhere.
const CERTAIN_BYTES: usize = 16;

/// Remembers the end of what was shown.
#[derive(Default)]
pub struct Shown {
    end: Vec<u8>,
    is_replay: bool,
}

impl Shown {
    /// A new connection: its first bytes are the last of what the console showed before.
    pub fn attached(&mut self) {
        self.is_replay = !self.end.is_empty();
    }

    /// The part of `bytes` that was not shown yet.
    pub fn take<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let new = if std::mem::take(&mut self.is_replay) { unseen(&self.end, bytes) } else { bytes };
        self.end.extend_from_slice(new);
        let surplus = self.end.len().saturating_sub(REMEMBERED_BYTES);
        self.end.drain(..surplus);
        new
    }
}

/// What of `replay` comes after what `end` ends with; all of it when that is not certain.
fn unseen<'a>(end: &[u8], replay: &'a [u8]) -> &'a [u8] {
    for length in [end.len(), 1024, 256, 64, CERTAIN_BYTES] {
        if length > end.len() || length < CERTAIN_BYTES {
            continue;
        }
        let wanted = &end[end.len() - length..];
        if let Some(position) = replay.windows(length).rposition(|window| window == wanted) {
            return &replay[position + length..];
        }
    }
    replay
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_shown_is_not_shown_again() {
        let mut shown = Shown::default();
        shown.attached();
        assert_eq!(shown.take(b"booting the kernel\r\nlogin: "), b"booting the kernel\r\nlogin: ");
        shown.attached();
        assert_eq!(shown.take(b"kernel\r\nlogin: root\r\n# "), b"kernel\r\nlogin: root\r\n# ");
        shown.attached();
        assert_eq!(shown.take(b"booting the kernel\r\nlogin: kernel\r\nlogin: root\r\n# ls\r\n"), b"ls\r\n");
        // Only what comes first is a replay.
        assert_eq!(shown.take(b"kernel\r\nlogin: root\r\n# ls\r\n"), b"kernel\r\nlogin: root\r\n# ls\r\n");
    }

    #[test]
    fn a_replay_that_has_nothing_in_common_is_shown_whole() {
        let mut shown = Shown::default();
        shown.take(b"0123456789abcdef0123456789abcdef");
        shown.attached();
        assert_eq!(shown.take(b""), b"");
        shown.attached();
        assert_eq!(shown.take(b"# "), b"# ");
    }

    #[test]
    fn memory_of_what_was_shown_does_not_grow() {
        let mut shown = Shown::default();
        for _ in 0..100 {
            shown.take(&[b'x'; 1000]);
        }
        assert_eq!(shown.end.len(), REMEMBERED_BYTES);
    }
}
