//! What others compute: the vectors that Certificate Transparency's own tests use for RFC 6962.

use berth_tlog::proof::{self, OutOfLog};
use berth_tlog::range::{Node, Range};
use berth_tlog::tile::{TILE_WIDTH, TileId, needed, node_of, root};
use berth_tlog::{Frontier, Hash};

const LEAVES: [&str; 8] =
    ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"];
const ROOTS: [&str; 8] = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
];

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).expect("hex")).collect()
}

fn hex(hash: &Hash) -> String {
    hash.0.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn roots_are_those_of_rfc_6962() {
    assert_eq!(hex(&Hash::empty_root()), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    let mut frontier = Frontier::new();
    for (leaf, expected) in LEAVES.iter().zip(ROOTS) {
        frontier.push(Hash::leaf(&unhex(leaf)));
        assert_eq!(hex(&frontier.root()), expected, "{} leaves", frontier.size());
    }
}

#[test]
fn proofs_are_those_of_rfc_6962() {
    let hashes: Vec<Hash> = LEAVES.iter().map(|leaf| Hash::leaf(&unhex(leaf))).collect();
    let of = |ranges: Vec<Range>| -> Vec<String> {
        ranges.into_iter().map(|range| hex(&hash(&hashes, range))).collect()
    };
    assert_eq!(
        of(proof::inclusion(0, 8).expect("in it")),
        [
            "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
        ]
    );
    assert_eq!(
        of(proof::consistency(6, 8).expect("smaller")),
        [
            "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
            "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        ]
    );
}

fn hash(leaves: &[Hash], range: Range) -> Hash {
    range.hash(|node| Some(root(&leaves[node_leaves(node)]))).expect("all are there")
}

fn node_leaves(node: Node) -> std::ops::Range<usize> {
    let width = 1usize << node.level;
    let start = usize::try_from(node.index).expect("small") * width;
    start..start + width
}

fn leaves(count: u64) -> Vec<Hash> {
    (0..count).map(|number| Hash::leaf(&number.to_be_bytes())).collect()
}

#[test]
fn every_proof_of_small_logs_proves_it_and_nothing_else() {
    let all = leaves(40);
    let roots: Vec<Hash> = (0..=40).map(|size| hash(&all, Range { low: 0, high: size })).collect();
    for size in 1..=40u64 {
        let at = roots[usize::try_from(size).expect("small")];
        for index in 0..size {
            let steps: Vec<Hash> = proof::inclusion(index, size)
                .expect("in it")
                .into_iter()
                .map(|range| hash(&all, range))
                .collect();
            let leaf = &all[usize::try_from(index).expect("small")];
            proof::verify_inclusion(leaf, index, size, &at, &steps).expect("proven");
            let other = &all[usize::try_from((index + 1) % 40).expect("small")];
            proof::verify_inclusion(other, index, size, &at, &steps).expect_err("another leaf");
            assert!(
                size == 1 || proof::verify_inclusion(leaf, (index + 1) % size, size, &at, &steps).is_err()
            );
            for cut in 0..steps.len() {
                proof::verify_inclusion(leaf, index, size, &at, &steps[..cut]).expect_err("cut off");
            }
        }
        for from in 1..=size {
            let old = roots[usize::try_from(from).expect("small")];
            let steps: Vec<Hash> = proof::consistency(from, size)
                .expect("smaller")
                .into_iter()
                .map(|range| hash(&all, range))
                .collect();
            proof::verify_consistency(from, size, &old, &at, &steps).expect("proven");
            let lie = Hash::leaf(b"lie");
            proof::verify_consistency(from, size, &lie, &at, &steps).expect_err("another past");
            proof::verify_consistency(from, size, &old, &lie, &steps).expect_err("another present");
        }
    }
    assert_eq!(proof::inclusion(5, 5), Err(OutOfLog { asked: 5, size: 5 }));
    assert_eq!(proof::consistency(6, 5), Err(OutOfLog { asked: 6, size: 5 }));
    assert!(proof::consistency(0, 5).is_err());
}

#[test]
fn a_proof_in_a_large_log_needs_a_few_tiles_and_comes_out_of_them() {
    let size = 70_000u64;
    let all = leaves(size);
    let tile = |id: TileId| -> Vec<Hash> {
        let width = TILE_WIDTH.pow(id.level);
        let start = usize::try_from(id.index).expect("small") * TILE_WIDTH * width;
        let end = all.len().min(start + TILE_WIDTH * width);
        all[start..end].chunks_exact(width).map(root).collect()
    };
    let whole = hash(&all, Range { low: 0, high: size });
    for index in [0, 1, 255, 256, 65_535, 65_536, 69_999] {
        let ranges = proof::inclusion(index, size).expect("in it");
        assert!(needed(&ranges).len() <= 6, "{:?}", needed(&ranges));
        let steps: Vec<Hash> = ranges
            .iter()
            .map(|range| range.hash(|node| node_of(&tile(TileId::of(node)), node)).expect("in its tile"))
            .collect();
        proof::verify_inclusion(&all[usize::try_from(index).expect("small")], index, size, &whole, &steps)
            .expect("proven");
    }
}
