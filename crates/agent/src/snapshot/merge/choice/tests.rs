use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;

fn id(number: usize) -> LayerId {
    let mut entropy = [0; 10];
    entropy[..8].copy_from_slice(&(number as u64).to_be_bytes());
    LayerId::from_entropy(entropy)
}

fn way(numbers: impl IntoIterator<Item = usize>) -> Vec<LayerId> {
    numbers.into_iter().map(id).collect()
}

fn stored(mib: u64) -> Stored {
    Stored { bytes: mib * MIB, frozen: true, shared: false }
}

/// A VM on layers 0 to `top`, each frozen one of so many MiB, and snapshots that end at these layers.
fn straight(top: usize, mib: impl Fn(usize) -> u64, snapshots: &[usize]) -> Tree {
    let mut files: BTreeMap<_, _> = (0..top).map(|number| (id(number), stored(mib(number)))).collect();
    files.insert(id(top), Stored { frozen: false, ..stored(1) });
    Tree {
        live: way(0..=top),
        snapshots: snapshots.iter().map(|last| way(0..=*last)).collect(),
        stored: files,
    }
}

fn chosen(tree: &Tree) -> Option<Vec<LayerId>> {
    tree.choose(16).map(|run| run.layers)
}

#[test]
fn layers_that_nobody_needs_apart_become_one_and_others_do_not() {
    assert_eq!(chosen(&straight(4, |_| 10, &[0, 1, 2, 3])), None, "each is a snapshot");
    assert_eq!(chosen(&straight(4, |_| 10, &[0, 3])), Some(way(1..=3)));
    assert_eq!(chosen(&straight(1, |_| 10, &[])), None, "the writable one is left alone");
}

#[test]
fn a_large_layer_is_not_copied_for_each_small_one() {
    let large_below = |number| if number == 0 { 4000 } else { 30 };
    assert_eq!(chosen(&straight(3, large_below, &[])), Some(way(1..=2)));
    assert_eq!(chosen(&straight(2, large_below, &[])), None);
    let half = |number| if number == 0 { 4000 } else { 2000 };
    assert_eq!(chosen(&straight(2, half, &[])), Some(way(0..=1)));
}

#[test]
fn a_branch_keeps_its_layers_apart() {
    let mut tree = straight(3, |_| 10, &[]);
    // Another way turns off after layer 1.
    tree.snapshots.push([way(0..=1), way([9])].concat());
    tree.stored.insert(id(9), stored(10));
    assert_eq!(chosen(&tree), Some(way(0..=1)));
    tree.snapshots.push(way(0..=0));
    assert_eq!(chosen(&tree), None);
}

#[test]
fn a_branch_that_the_vm_is_not_on_is_tidied_too() {
    let mut tree = straight(1, |_| 10, &[0]);
    tree.snapshots.push([way(0..=0), way(5..=7)].concat());
    tree.stored.extend((5..=7).map(|number| (id(number), stored(10))));
    let run = tree.choose(16).expect("a run");
    assert_eq!((run.layers, run.below), (way(5..=7), Some(id(0))));
}

#[test]
fn what_clones_have_too_is_merged_only_when_it_must_be() {
    let mut tree = straight(4, |_| 10, &[]);
    tree.stored.values_mut().for_each(|stored| stored.shared = true);
    assert_eq!(chosen(&tree), None);
    let mut long = straight(14, |_| 10, &[]);
    long.stored.values_mut().for_each(|stored| stored.shared = true);
    assert!(chosen(&long).is_some());
}

/// Carries a run out as the agent does.
fn merge(tree: &mut Tree, run: &Run, result: &LayerId) {
    let bytes = run.layers.iter().map(|layer| tree.stored[layer].bytes).sum();
    tree.stored.insert(result.clone(), Stored { bytes, frozen: true, shared: false });
    for way in std::iter::once(&mut tree.live).chain(&mut tree.snapshots) {
        if let Some(new) = replaced(way, &run.layers, result) {
            *way = new;
        }
    }
    tidy(tree);
}

fn tidy(tree: &mut Tree) {
    let gone: Vec<LayerId> = tree.unneeded().cloned().collect();
    tree.stored.retain(|layer, _| !gone.contains(layer));
}

/// What somebody does.
#[derive(Debug, Clone)]
enum Deed {
    Take { mib: u64 },
    Restore { which: usize },
    Delete { which: usize },
}

fn deed() -> impl Strategy<Value = Deed> {
    prop_oneof![
        5 => (0..200_u64).prop_map(|mib| Deed::Take { mib }),
        1 => (0..1000_usize).prop_map(|which| Deed::Restore { which }),
        3 => (0..1000_usize).prop_map(|which| Deed::Delete { which }),
    ]
}

/// What a way says, with each merged layer spelt out.
fn spelt(way: &[LayerId], made_of: &BTreeMap<LayerId, Vec<LayerId>>) -> Vec<LayerId> {
    way.iter().flat_map(|layer| made_of.get(layer).cloned().unwrap_or_else(|| vec![layer.clone()])).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_done_every_way_says_what_it_said_and_nothing_is_lost_or_left(
        deeds in prop::collection::vec(deed(), 1..120),
    ) {
        let mut tree = straight(0, |_| 1, &[]);
        let mut meant: Vec<Vec<LayerId>> = Vec::new();
        let mut live_meant = tree.live.clone();
        let mut made_of = BTreeMap::new();
        let mut next = 1;
        let mut fresh = || { next += 1; id(next) };
        for deed in deeds {
            match deed {
                Deed::Take { mib } => {
                    let top = tree.live.last().expect("a top").clone();
                    tree.stored.insert(top, stored(mib));
                    tree.snapshots.push(tree.live.clone());
                    meant.push(live_meant.clone());
                    let new = fresh();
                    tree.stored.insert(new.clone(), Stored { frozen: false, ..stored(0) });
                    tree.live.push(new.clone());
                    live_meant.push(new);
                }
                Deed::Restore { which } if !meant.is_empty() => {
                    let which = which % meant.len();
                    let new = fresh();
                    tree.stored.insert(new.clone(), Stored { frozen: false, ..stored(0) });
                    tree.live = [tree.snapshots[which].clone(), vec![new.clone()]].concat();
                    live_meant = [meant[which].clone(), vec![new]].concat();
                }
                Deed::Delete { which } if !meant.is_empty() => {
                    let which = which % meant.len();
                    tree.snapshots.remove(which);
                    meant.remove(which);
                }
                Deed::Restore { .. } | Deed::Delete { .. } => {}
            }
            tidy(&mut tree);
            for _ in 0..100 {
                let Some(run) = tree.choose(16) else { break };
                prop_assert!(run.layers.len() > 1 && !run.layers.contains(tree.live.last().expect("top")));
                let result = fresh();
                made_of.insert(result.clone(), spelt(&run.layers, &made_of));
                merge(&mut tree, &run, &result);
            }
            prop_assert!(tree.choose(16).is_none(), "it comes to an end");
            prop_assert_eq!(spelt(&tree.live, &made_of), live_meant.clone());
            prop_assert!(tree.live.len() <= 12, "{}", tree.live.len());
            for (way, meant) in tree.snapshots.iter().zip(&meant) {
                prop_assert_eq!(&spelt(way, &made_of), meant);
                prop_assert!(way.len() <= 16);
            }
            let needed = || std::iter::once(&tree.live).chain(&tree.snapshots).flatten();
            prop_assert!(needed().all(|layer| tree.stored.contains_key(layer)), "nothing is lost");
            prop_assert!(tree.stored.keys().all(|layer| needed().any(|one| one == layer)), "nothing is left");
        }
    }
}
