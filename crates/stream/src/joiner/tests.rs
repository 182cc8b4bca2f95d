use std::cell::RefCell;
use std::rc::Rc;

use super::*;
use crate::splitter::{PageSink, SplitOptions, Splitter};
use crate::test_stream::usual;

#[derive(Clone)]
struct Memory(Rc<RefCell<Vec<u8>>>);

impl MemorySource for Memory {
    fn read_at(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let memory = self.0.borrow();
        let from = memory.get(offset as usize..offset as usize + bytes.len());
        bytes.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

impl PageSink for Memory {
    fn pages(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.borrow_mut()[offset as usize..offset as usize + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn zeros(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.0.borrow_mut()[offset as usize..(offset + length) as usize].fill(0);
        Ok(())
    }
}

fn split(stream: &[u8], filled_with: u8) -> (Memory, Vec<u8>, u64) {
    let memory = Memory(Rc::new(RefCell::new(vec![filled_with; 0x4000])));
    let options =
        SplitOptions { memory_block: "pc.ram".into(), memory_bytes: 0x4000, sink_is_zero: filled_with == 0 };
    let mut splitter = Splitter::new(options, memory, Vec::new());
    splitter.feed(stream).expect("a stream");
    let (memory, device, summary) = splitter.finish().expect("whole");
    (memory, device, summary.pages + summary.zero_pages)
}

#[test]
fn split_and_joined_a_stream_says_the_same_of_every_page() {
    let (memory, device, _) = split(&usual(), 0);
    for piece in [1, 1000, usize::MAX] {
        let mut joiner = Joiner::new("pc.ram", memory.clone(), Vec::new());
        device.chunks(piece).for_each(|input| joiner.feed(input).expect("a stream"));
        let full = joiner.finish().expect("whole");
        // Into a memory full of something else, so that pages that are not said to be zero would show.
        let (again, device_again, pages) = split(&full, 0xaa);
        assert_eq!(*again.0.borrow(), *memory.0.borrow());
        assert_eq!(pages, 4);
        // The part that was put in leaves its frame behind; the rest is the same.
        assert_eq!(device_again.len(), device.len() + part_head(0).len() + part_end(0).len());
    }
}

#[test]
fn an_image_that_is_too_short_is_told_from_a_wrong_device_file() {
    let (memory, device, _) = split(&usual(), 0);
    memory.0.borrow_mut().truncate(0x3000);
    let short = Joiner::new("pc.ram", memory.clone(), Vec::new()).feed(&device);
    assert!(matches!(short, Err(JoinError::Memory { offset: 0, .. })));
    let other = Joiner::new("mem", memory.clone(), Vec::new()).feed(&device);
    assert!(matches!(other, Err(JoinError::MemoryBlockMissing { .. })));
    let wrong = Joiner::new("pc.ram", memory, Vec::new()).feed(b"no stream");
    assert!(matches!(wrong, Err(JoinError::Stream(_))));
}
