//! Writing the audit out, tile by tile, so that a log of any size takes no memory.
//!
//! As JSON lines it is what [`berth_tlog::export`] checks: the records' own bytes, their hashes, and the checkpoints.
//! What is asked for by time is a stretch of whole records in the log's order: from the first that ended at or after
//! `since`, to the last before `until`.

use std::sync::Arc;

use berth_model::Timestamp;
use berth_tlog::export::{checkpoint_line, header_line, tile_line, tile_start};
use berth_tlog::tile::{TILE_LEAVES, TileId};
use bytes::{Bytes, BytesMut};
use futures_util::Stream;

use super::format::Format;
use super::reading::time_of;
use super::tree::Tree;
use super::{Audit, AuditError, layout};

/// The stretch that is written out.
struct Stretch {
    audit: Audit,
    tree: Arc<Tree>,
    format: Format,
    first: u64,
    end: u64,
    at: u64,
    state: State,
}

enum State {
    Head,
    Records,
    Done,
}

impl Audit {
    /// The log as it is now, from `since` until `until`, in this format.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn export(
        &self,
        format: Format,
        since: Option<Timestamp>,
        until: Option<Timestamp>,
    ) -> Result<impl Stream<Item = Result<Bytes, AuditError>> + Send + use<>, AuditError> {
        let tree = Arc::clone(&self.growth().borrow());
        let size = tree.size();
        let first = match since {
            Some(since) => self.first_at(since, size).await?,
            None => 0,
        };
        let end = match until {
            Some(until) => self.first_at(until, size).await?.max(first),
            None => size,
        };
        let stretch =
            Stretch { audit: self.clone(), tree, format, first, end, at: first, state: State::Head };
        Ok(futures_util::stream::try_unfold(stretch, |mut stretch| async move {
            let next = stretch.next().await?;
            Ok(next.map(|bytes| (bytes, stretch)))
        }))
    }

    /// The first record that ended at or after this time.
    async fn first_at(&self, time: Timestamp, size: u64) -> Result<u64, AuditError> {
        let first = self.first_since(time, size).await?;
        for (line, sequence) in self.lines_from(first).await?.iter().zip(first..size) {
            if time_of(&layout::record_of(line)?) >= time {
                return Ok(sequence);
            }
        }
        Ok((first + TILE_LEAVES).min(size))
    }
}

impl Stretch {
    async fn next(&mut self) -> Result<Option<Bytes>, AuditError> {
        match self.state {
            State::Done => Ok(None),
            State::Head => {
                self.state = State::Records;
                if self.format != Format::Jsonl {
                    return Box::pin(self.next()).await;
                }
                let before = self.audit.frontier(&self.tree, tile_start(self.first)).await?;
                let origin = self.audit.key().origin;
                Ok(Some(header_line(&origin, self.first, self.end, &before).into()))
            }
            State::Records if self.at < self.end => self.tile().await.map(Some),
            State::Records => {
                self.state = State::Done;
                if self.format != Format::Jsonl || self.first < self.end {
                    return Ok(None);
                }
                // Nothing ended then. That can be verified too: with the hashes of what stands around the place.
                let mut out = BytesMut::new();
                if self.first == self.tree.size() && self.first.is_multiple_of(TILE_LEAVES) {
                    out.extend_from_slice(self.last(None).as_bytes());
                } else {
                    self.close(self.first / TILE_LEAVES, &mut out).await?;
                }
                Ok(Some(out.freeze()))
            }
        }
    }

    /// The records of one tile that belong to the stretch.
    async fn tile(&mut self) -> Result<Bytes, AuditError> {
        let (first, index) = (self.at, self.at / TILE_LEAVES);
        let end = self.end.min((index + 1) * TILE_LEAVES);
        let lines = self.audit.lines_from(first).await?;
        let wanted = usize::try_from(end - first).unwrap_or(usize::MAX);
        let lines = lines.get(..wanted).ok_or_else(|| layout::damaged(&format!("records from {first}")))?;
        let mut out = BytesMut::new();
        for line in lines {
            match self.format {
                Format::Jsonl => out.extend_from_slice(line),
                format => out.extend_from_slice(format.text(&layout::record_of(line)?).as_bytes()),
            }
            out.extend_from_slice(b"\n");
        }
        self.at = end;
        if self.format == Format::Jsonl {
            self.close(index, &mut out).await?;
        }
        Ok(out.freeze())
    }

    /// The hashes behind a tile's records, and behind the last of them the checkpoint.
    async fn close(&mut self, index: u64, out: &mut BytesMut) -> Result<(), AuditError> {
        let id = TileId { level: 0, index };
        let (hashes, note) = match self.tree.partial(id) {
            Some(partial) => (partial.to_vec(), None),
            None => {
                let (hashes, note) = layout::full_tile(&**self.audit.store(), index).await?;
                (hashes, Some(note))
            }
        };
        out.extend_from_slice(tile_line(index, &hashes, note.as_deref()).as_bytes());
        if self.at == self.end {
            out.extend_from_slice(self.last(note).as_bytes());
            self.state = State::Done;
        }
        Ok(())
    }

    /// The last line: the checkpoint that was signed when the last tile was full, or the newest.
    fn last(&self, note: Option<String>) -> String {
        match note {
            Some(note) if self.end < self.tree.size() => checkpoint_line(&note),
            _ => checkpoint_line(self.tree.note()),
        }
    }
}
