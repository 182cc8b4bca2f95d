//! Which layers are to be merged next: pure, so that it can be tried with trees of any shape.
//!
//! The layers of a VM are a tree. Each snapshot is a way from the root to one of them, and the VM itself is one more. A
//! *run* is a piece of such a way. Merging it makes one new layer that takes the run's place in each way that goes
//! through the whole of it; a way that ends or turns off within it keeps the old layers. So every merge is right, and
//! what differs is the price: all that is in the run is copied, and what somebody still needs of it is there twice.
//!
//! Two reasons to merge, therefore:
//!
//! - **The VM's way gets long.** Past three quarters of the most that is allowed, the run is merged that costs least for
//!   each layer that it saves, whether somebody needs its inner layers or not.
//! - **Nobody needs the layers apart**, as after a snapshot in the middle was deleted. That is mere tidying: it is done
//!   where what is copied is in proportion, as a large layer must not be copied for each small one that comes to lie on
//!   it. A run whose other layers have a quarter of its largest is: so each byte is copied a few times in its life.

use std::collections::BTreeMap;

use berth_model::LayerId;

/// A run this small is always tidied up, in bytes: it takes the disk a moment.
const SMALL_BYTES: u64 = 64 << 20;
/// What a layer costs besides its data, in bytes: its tables, and a file to open.
const LAYER_COST_BYTES: u64 = 512 << 10;

/// What is known of a layer's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// What it occupies on the disk, in bytes.
    pub bytes: u64,
    /// It is never written again.
    pub frozen: bool,
    /// Others have it under a name of their own, clones say: removing it here frees nothing.
    pub shared: bool,
}

/// A VM's layers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tree {
    /// The VM's own way, from the layer above the image to the writable one.
    pub live: Vec<LayerId>,
    /// Each snapshot's.
    pub snapshots: Vec<Vec<LayerId>>,
    /// The files.
    pub stored: BTreeMap<LayerId, Stored>,
}

/// What is to be merged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// The layers, from the lowest to the uppermost; two at least.
    pub layers: Vec<LayerId>,
    /// What they lie on; none: on the image, or on nothing.
    pub below: Option<LayerId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Price {
    copied: u64,
    largest: u64,
    /// What stays although it was copied.
    kept: u64,
    saved_layers: u64,
}

impl Price {
    const fn of_a_layer_saved(&self) -> u64 {
        (self.copied + self.kept) / self.saved_layers
    }

    const fn is_in_proportion(&self) -> bool {
        self.copied <= SMALL_BYTES || self.copied - self.largest >= self.largest / 4
    }
}

impl Tree {
    /// The run to merge next; none when all is well. `layers_max` is the longest that the VM's way may be, its writable
    /// layer counted.
    pub fn choose(&self, layers_max: usize) -> Option<Run> {
        if self.live.len() > begin_at(layers_max) {
            return self.cheapest(&self.live, |_| true);
        }
        let ways = std::iter::once(&self.live).chain(&self.snapshots);
        ways.filter_map(|way| self.cheapest(way, |price| price.kept == 0 && price.is_in_proportion())).next()
    }

    fn cheapest(&self, way: &[LayerId], allowed: impl Fn(&Price) -> bool) -> Option<Run> {
        let reach = self.reach(way);
        let mut best: Option<(u64, usize, usize)> = None;
        for first in 0..way.len() {
            for last in first + 1..way.len() {
                let Some(price) = self.price(way, &reach, first, last) else { break };
                let each = price.of_a_layer_saved();
                if allowed(&price) && best.is_none_or(|(least, ..)| each < least) {
                    best = Some((each, first, last));
                }
            }
        }
        let (_, first, last) = best?;
        let below = first.checked_sub(1).map(|below| way[below].clone());
        Some(Run { layers: way[first..=last].to_vec(), below })
    }

    /// None when the run can't be merged, and no longer one either.
    fn price(&self, way: &[LayerId], reach: &[usize], first: usize, last: usize) -> Option<Price> {
        let mut price = Price { copied: 0, largest: 0, kept: 0, saved_layers: (last - first) as u64 };
        for at in first..=last {
            // What the VM writes to is not frozen, and so is never in a run.
            let stored = self.stored.get(&way[at]).filter(|stored| stored.frozen)?;
            let bytes = stored.bytes + LAYER_COST_BYTES;
            price.copied += bytes;
            price.largest = price.largest.max(bytes);
            if reach[at] < last || stored.shared {
                price.kept += bytes;
            }
        }
        Some(price)
    }

    /// For each layer of a way: up to where all ways that have this layer go on as this one does.
    fn reach(&self, way: &[LayerId]) -> Vec<usize> {
        let mut reach = vec![way.len().saturating_sub(1); way.len()];
        for other in std::iter::once(&self.live).chain(&self.snapshots) {
            let common = way.iter().zip(other.iter()).take_while(|(ours, theirs)| ours == theirs).count();
            for at in &mut reach[..common] {
                *at = (*at).min(common - 1);
            }
        }
        reach
    }

    /// What is there and nobody needs.
    pub fn unneeded(&self) -> impl Iterator<Item = &LayerId> {
        let needed = |layer: &LayerId| {
            self.live.contains(layer) || self.snapshots.iter().any(|way| way.contains(layer))
        };
        self.stored.keys().filter(move |layer| !needed(layer))
    }
}

/// Past how many layers the VM's way is shortened although they are needed apart: early enough that this is done in the
/// background, before a snapshot has to wait for it.
const fn begin_at(layers_max: usize) -> usize {
    layers_max - layers_max / 4
}

/// A way with the new layer in the place of the run; none when the whole run is not in it.
pub fn replaced(way: &[LayerId], run: &[LayerId], result: &LayerId) -> Option<Vec<LayerId>> {
    let at = way.iter().position(|layer| Some(layer) == run.first())?;
    let end = at + run.len();
    if way.get(at..end) != Some(run) {
        return None;
    }
    Some([&way[..at], std::slice::from_ref(result), &way[end..]].concat())
}

#[cfg(test)]
mod tests;
