//! The block graph: each layer a node with a name of its own, each node's backing stated, nothing probed.

use std::path::Path;

use berth_model::LayerId;
use berth_model::image::{Image, ImagePart, PartFormat, PartRole};
use serde_json::{Map, Value, json};

use crate::layout::VmDirs;

/// The node of the cloud-init seed.
pub const SEED_NODE: &str = "seed";
/// The node of the firmware's program.
pub const FIRMWARE_NODE: &str = "firmware";
/// The node of the firmware's variables.
pub const VARIABLES_NODE: &str = "variables";

/// A disk of a VM from its bottom to its writable top.
#[derive(Debug, Clone, Copy)]
pub struct Chain<'a> {
    /// The VM's directories.
    pub dirs: &'a VmDirs,
    /// The image at the bottom, which may have no disk; none under a data disk.
    pub image: Option<&'a Image>,
    /// The layers above it.
    pub layers: &'a [LayerId],
    /// Whether the writable layer is to go past the host's page cache.
    pub direct_io: bool,
}

/// What a layer lies on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backing {
    /// Nothing: it is the bottom.
    None,
    /// This node.
    Node(String),
}

impl Chain<'_> {
    /// The nodes' names from the bottom to the top.
    pub fn nodes(&self) -> Vec<String> {
        let image = self.bottom().map(|(image, _)| image_node(image));
        image.into_iter().chain(self.layers.iter().map(layer_node)).collect()
    }

    /// The node that the disk device is to be given.
    pub fn top_node(&self) -> String {
        self.nodes().pop().unwrap_or_default()
    }

    /// The options of each node from the bottom to the top.
    pub fn node_options(&self) -> Vec<Value> {
        let mut all = Vec::new();
        let mut backing = Backing::None;
        if let Some((image, part)) = self.bottom() {
            all.push(self.image_options(image, part));
            backing = Backing::Node(image_node(image));
        }
        for (index, layer) in self.layers.iter().enumerate() {
            let access = match index + 1 == self.layers.len() {
                true => Access::Writable { direct_io: self.direct_io },
                false => Access::Frozen,
            };
            all.push(Value::Object(layer_options(self.dirs, layer, &backing, access)));
            backing = Backing::Node(layer_node(layer));
        }
        all
    }

    fn bottom(&self) -> Option<(&Image, &ImagePart)> {
        self.image.and_then(|image| Some((image, image.part(PartRole::Disk)?)))
    }

    fn image_options(&self, image: &Image, part: &ImagePart) -> Value {
        let path = self.dirs.pool.part(&image.id, PartRole::Disk, part.format);
        let node = image_node(image);
        let file = file_options(&path, &format!("f{node}"), Access::Frozen);
        match part.format {
            PartFormat::Raw => json!({"driver": "raw", "node-name": node, "read-only": true, "file": file}),
            PartFormat::Qcow2 => {
                json!({"driver": "qcow2", "node-name": node, "read-only": true, "backing": null, "file": file})
            }
        }
    }
}

/// What may be done with a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It is never written again; others may read it through the same pages of the host's cache.
    Frozen,
    /// It was written to in this process until now: read as it was opened then. QEMU loses the layer when a reopening
    /// changes whether the host's page cache is used: its next read of the header has the old alignment.
    JustFrozen {
        /// As it was.
        direct_io: bool,
    },
    /// The guest writes to it.
    Writable {
        /// Past the host's page cache, so that what the guest has flushed does not wait in memory for a pause.
        direct_io: bool,
    },
}

/// The options of a layer's node, for the command line and for `blockdev-add`.
pub fn layer_options(
    dirs: &VmDirs,
    layer: &LayerId,
    backing: &Backing,
    access: Access,
) -> Map<String, Value> {
    let node = layer_node(layer);
    let file = file_options(&dirs.layer(layer), &format!("f{node}"), access);
    let backing = match backing {
        Backing::None => Value::Null,
        Backing::Node(node) => Value::String(node.clone()),
    };
    let mut options = Map::new();
    options.insert("driver".into(), "qcow2".into());
    options.insert("node-name".into(), node.into());
    options.insert("read-only".into(), access.is_frozen().into());
    options.insert("cache".into(), cache(access));
    options.insert("backing".into(), backing);
    options.insert("file".into(), file);
    options
}

/// The options of the seed's node.
pub fn seed_options(path: &Path) -> Value {
    let file = file_options(path, "fseed", Access::Frozen);
    json!({"driver": "raw", "node-name": SEED_NODE, "read-only": true, "file": file})
}

/// The options of the nodes behind the two flash chips of a machine with UEFI firmware.
pub fn flash_options(code: &Path, variables: &Path) -> [Value; 2] {
    // What QEMU writes to the chip's file waits in the host's cache for nothing: it is half a MiB, written seldom.
    let writable = Access::Writable { direct_io: false };
    [(FIRMWARE_NODE, code, Access::Frozen), (VARIABLES_NODE, variables, writable)].map(
        |(node, path, access)| {
            let file = file_options(path, &format!("f{node}"), access);
            json!({"driver": "raw", "node-name": node, "read-only": access.is_frozen(), "file": file})
        },
    )
}

/// The block node of a layer.
pub fn layer_node(layer: &LayerId) -> String {
    format!("l-{}", body(layer.as_str()))
}

/// The block node of an image.
pub fn image_node(image: &Image) -> String {
    format!("i-{}", body(image.id.as_str()))
}

fn body(id: &str) -> &str {
    id.split_once('-').map_or(id, |(_, body)| body)
}

impl Access {
    const fn is_frozen(self) -> bool {
        match self {
            Self::Frozen | Self::JustFrozen { .. } => true,
            Self::Writable { .. } => false,
        }
    }
}

fn cache(access: Access) -> Value {
    let direct = match access {
        Access::Frozen => false,
        Access::JustFrozen { direct_io } | Access::Writable { direct_io } => direct_io,
    };
    json!({"direct": direct, "no-flush": false})
}

fn file_options(path: &Path, node: &str, access: Access) -> Value {
    // What a guest discards is kept: QEMU before 10.0.11 can lose data when a discard meets copying on write.
    json!({
        "driver": "file",
        "node-name": node,
        "filename": path.display().to_string(),
        "read-only": access.is_frozen(),
        "cache": cache(access),
        "discard": "ignore",
    })
}
