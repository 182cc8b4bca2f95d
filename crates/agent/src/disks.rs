//! A VM's disks: the root disk, which lies on the image, and data disks, which lie on nothing.
//!
//! Each is a chain of layers. They are of one instant always: frozen, put back, cloned and moved together. What is on record
//! of them is in `vm.json` (`chain` and `data`) and in each snapshot's manifest (`layers` and `data`).
//!
//! Whoever commands a new layer names one id, the root disk's. Those of the data disks follow from it, so that a step that
//! is run again names the same layers.

use berth_api::agent::VmDefinition;
use berth_model::LayerId;
use berth_model::vm::DATA_DISKS_MAX;

/// The number of the disk that lies on the image.
pub const ROOT: usize = 0;

/// Most disks of a VM.
pub const DISKS_MAX: usize = 1 + DATA_DISKS_MAX;

/// The layers of each of a VM's disks, from the lowest to the uppermost; the root disk first. There is always that one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disks(Vec<Vec<LayerId>>);

impl Disks {
    /// Those of a root disk and of data disks.
    pub fn new(root: Vec<LayerId>, data: Vec<Vec<LayerId>>) -> Self {
        Self(std::iter::once(root).chain(data).collect())
    }

    /// Those of a new VM: one layer each.
    pub fn first(definition: &VmDefinition) -> Self {
        let count = count(definition);
        Self(tops(&definition.first_layer, count).map(|layer| vec![layer]).collect())
    }

    /// The root disk's layers, and those of each data disk.
    pub fn into_parts(self) -> (Vec<LayerId>, Vec<Vec<LayerId>>) {
        let mut all = self.0.into_iter();
        (all.next().unwrap_or_default(), all.collect())
    }

    /// How many disks there are.
    pub const fn count(&self) -> usize {
        self.0.len()
    }

    /// Each disk's layers.
    pub fn each(&self) -> impl Iterator<Item = &[LayerId]> {
        self.0.iter().map(Vec::as_slice)
    }

    /// Each disk's layers, to be changed.
    pub fn each_mut(&mut self) -> impl Iterator<Item = &mut Vec<LayerId>> {
        self.0.iter_mut()
    }

    /// One disk's layers; none if there is no such disk.
    pub fn of(&self, disk: usize) -> &[LayerId] {
        self.0.get(disk).map_or(&[], Vec::as_slice)
    }

    /// The root disk's layers.
    pub fn root(&self) -> &[LayerId] {
        self.of(ROOT)
    }

    /// All layers of all disks.
    pub fn layers(&self) -> impl Iterator<Item = &LayerId> {
        self.0.iter().flatten()
    }

    /// Whether a layer is of one of them.
    pub fn contains(&self, layer: &LayerId) -> bool {
        self.layers().any(|one| one == layer)
    }

    /// Which disk's a layer is, and its place there.
    pub fn find(&self, layer: &LayerId) -> Option<(usize, usize)> {
        let place = |chain: &Vec<LayerId>| chain.iter().position(|one| one == layer);
        self.0.iter().enumerate().find_map(|(disk, chain)| place(chain).map(|at| (disk, at)))
    }

    /// The uppermost layer of each disk that has one.
    pub fn tops(&self) -> impl Iterator<Item = &LayerId> {
        self.0.iter().filter_map(|chain| chain.last())
    }

    /// Of how many layers the longest is.
    pub fn longest(&self) -> usize {
        self.0.iter().map(Vec::len).max().unwrap_or_default()
    }

    /// With new layers on top.
    #[must_use]
    pub fn with_tops(mut self, new_top: &LayerId) -> Self {
        let tops = tops(new_top, self.0.len());
        self.0.iter_mut().zip(tops).for_each(|(chain, top)| chain.push(top));
        self
    }

    /// Without new layers that may be on top already; none if one lies elsewhere, or there is nothing below it.
    #[must_use]
    pub fn without_tops(mut self, new_top: &LayerId) -> Option<Self> {
        let tops = tops(new_top, self.0.len());
        for (chain, top) in self.0.iter_mut().zip(tops) {
            chain.pop_if(|layer| *layer == top);
            if chain.is_empty() || chain.contains(&top) {
                return None;
            }
        }
        Some(self)
    }

    /// With other layers of one disk.
    #[must_use]
    pub fn with_disk(mut self, disk: usize, layers: &[LayerId]) -> Self {
        if let Some(chain) = self.0.get_mut(disk) {
            *chain = layers.to_vec();
        }
        self
    }

    /// Without the writable layers.
    #[must_use]
    pub fn frozen(mut self) -> Self {
        self.0.iter_mut().for_each(|chain| drop(chain.pop()));
        self
    }
}

/// How many disks a VM has.
pub fn count(definition: &VmDefinition) -> usize {
    1 + definition.spec.data_disks_mib.len()
}

/// Whether these can be a VM's disks, by what somebody else says: as many as it has, each with a layer, and none twice.
pub fn are_of(disks: &Disks, definition: &VmDefinition) -> bool {
    let mut layers: Vec<&LayerId> = disks.layers().collect();
    let named = layers.len();
    layers.sort_unstable();
    layers.dedup();
    layers.len() == named && disks.count() == count(definition) && disks.each().all(|chain| !chain.is_empty())
}

/// The ids of the new layers of so many disks.
pub fn tops(new_top: &LayerId, count: usize) -> impl Iterator<Item = LayerId> {
    (0..count).map(|disk| top(new_top, disk))
}

/// The id of a disk's new layer.
pub fn top(new_top: &LayerId, disk: usize) -> LayerId {
    if disk == ROOT {
        return new_top.clone();
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(new_top.as_str().as_bytes());
    hasher.update(&(disk as u64).to_be_bytes());
    let mut entropy = [0; 10];
    hasher.finalize_xof().fill(&mut entropy);
    LayerId::from_entropy(entropy)
}

/// How large a disk is, as the guest sees it, in bytes.
pub fn size_bytes(definition: &VmDefinition, disk: usize) -> u64 {
    let spec = &definition.spec;
    let mib = disk.checked_sub(1).map_or(Some(spec.disk_mib), |data| spec.data_disks_mib.get(data).copied());
    mib.unwrap_or_default().saturating_mul(1 << 20)
}

/// What a data disk is called, by its number from 1: its serial number in the guest, and its name in comparisons.
pub fn name(disk: usize) -> String {
    format!("data{disk}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fittings::Fittings;
    use crate::layout::VmRecord;

    fn id(number: u8) -> LayerId {
        LayerId::from_entropy([number; 10])
    }

    fn disks() -> Disks {
        Disks::new(vec![id(1), id(2)], vec![vec![id(3)], vec![id(4), id(5)]])
    }

    #[test]
    fn new_tops_are_named_by_the_root_disks_and_are_all_different() {
        let named: Vec<LayerId> = tops(&id(9), 9).collect();
        assert_eq!(named[0], id(9));
        assert_eq!(named, tops(&id(9), 9).collect::<Vec<_>>());
        let mut all: Vec<LayerId> = named.into_iter().chain(tops(&id(8), 9)).collect();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 18);
    }

    #[test]
    fn tops_that_are_laid_on_come_off_again_also_when_only_some_are_there() {
        let more = disks().with_tops(&id(9));
        assert_eq!((more.longest(), more.count()), (3, 3));
        assert_eq!(more.clone().without_tops(&id(9)), Some(disks()));
        assert_eq!(more.clone().frozen(), disks());
        let mut half = more;
        half.each_mut().next().expect("root").pop();
        assert_eq!(half.without_tops(&id(9)), Some(disks()));
        assert_eq!(disks().without_tops(&id(9)), Some(disks()));
    }

    #[test]
    fn a_layer_that_lies_deeper_can_not_be_a_new_top() {
        assert_eq!(disks().without_tops(&id(1)), None);
        let alone = Disks::new(vec![id(1)], Vec::new());
        assert_eq!(alone.without_tops(&id(1)), None, "nothing is below it");
    }

    #[test]
    fn a_vm_of_before_there_were_data_disks_has_none() {
        let definition = crate::testing::definition(1);
        let disks = Disks::first(&definition);
        assert_eq!(disks, Disks::new(vec![definition.first_layer.clone()], Vec::new()));
        let record = VmRecord::new(definition, disks, Fittings::default());
        let written = serde_json::to_value(&record).expect("plain data");
        assert!(written.get("data").is_none(), "{written}");
        assert!(written["definition"]["spec"].get("data_disks_mib").is_none(), "{written}");
        assert_eq!(serde_json::from_value::<VmRecord>(written).expect("a record"), record);
    }

    #[test]
    fn what_is_said_to_be_a_vms_disks_must_be_as_many_and_have_each_layer_once() {
        let mut definition = crate::testing::definition(1);
        definition.spec.data_disks_mib = vec![1, 1];
        assert!(are_of(&disks(), &definition));
        assert!(!are_of(&disks().with_disk(1, &[]), &definition));
        assert!(!are_of(&disks().with_disk(1, &[id(1)]), &definition));
        definition.spec.data_disks_mib.pop();
        assert!(!are_of(&disks(), &definition));
    }

    #[test]
    fn a_layer_is_found_on_its_disk() {
        assert_eq!(disks().find(&id(5)), Some((2, 1)));
        assert_eq!(disks().find(&id(6)), None);
    }
}
