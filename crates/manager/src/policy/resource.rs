//! What an action is about, as it is to the policies: its kind, its id, what it is in, and what guards look at.

use berth_model::SegmentId;
use berth_model::snapshot::Snapshot;
use berth_model::vm::{STANDARD_CLASS, Vm};

/// The one cluster's id in policies.
const CLUSTER_ID: &str = "cluster";
/// The id of what was asked for and is not there.
pub(super) const ABSENT_ID: &str = "absent";

macro_rules! kinds {
    ($($(#[doc = $doc:literal])* $name:ident = $noun:literal;)*) => {
        /// What kind of thing something is done to.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum ResourceKind {$($(#[doc = $doc])* $name),*}

        impl ResourceKind {
            /// Every kind.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The noun, as in the audit (`vm:default/books`).
            pub const fn noun(self) -> &'static str {
                match self {$(Self::$name => $noun),*}
            }

            /// The entity type in policies.
            pub const fn cedar_type(self) -> &'static str {
                match self {$(Self::$name => stringify!($name)),*}
            }
        }
    };
}

kinds! {
    /// The cluster as a whole.
    Cluster = "cluster";
    /// A segment.
    Segment = "segment";
    /// A host.
    Host = "host";
    /// An image.
    Image = "image";
    /// A VM.
    Vm = "vm";
    /// A snapshot of a VM.
    Snapshot = "snapshot";
    /// A schedule of snapshots.
    Schedule = "schedule";
    /// A place for backups.
    Repository = "repository";
    /// An operation.
    Operation = "operation";
    /// A user.
    User = "user";
    /// A token.
    Token = "token";
    /// A team.
    Team = "team";
    /// A role that somebody made.
    Role = "role";
    /// A grant.
    Grant = "grant";
    /// A policy that somebody wrote.
    Policy = "policy";
    /// What waits for a second person.
    Approval = "approval";
    /// The list of what the caller may see.
    Listing = "list";
}

/// Something that guards look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attribute {
    /// Yes or no.
    Flag(bool),
    /// A word.
    Text(String),
}

/// Something that an action is about, with what it is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    pub(super) kind: ResourceKind,
    pub(super) id: String,
    pub(super) label: String,
    pub(super) parent: Option<Box<Self>>,
    pub(super) attributes: Vec<(&'static str, Attribute)>,
}

impl Resource {
    /// The cluster.
    pub fn cluster() -> Self {
        Self {
            kind: ResourceKind::Cluster,
            id: CLUSTER_ID.into(),
            label: "cluster".into(),
            parent: None,
            attributes: Vec::new(),
        }
    }

    /// The list of what the caller may see.
    pub fn listing() -> Self {
        Self { kind: ResourceKind::Listing, id: "listing".into(), label: "list".into(), ..Self::cluster() }
    }

    /// A thing that is in another, called so by people.
    pub fn inside(parent: Self, kind: ResourceKind, id: &str, name: &str) -> Self {
        let label = format!("{}:{name}", kind.noun());
        let attributes = usual_attributes(kind);
        Self { kind, id: id.to_owned(), label, parent: Some(Box::new(parent)), attributes }
    }

    /// A thing that is directly in the cluster.
    pub fn of_cluster(kind: ResourceKind, id: &str, name: &str) -> Self {
        Self::inside(Self::cluster(), kind, id, name)
    }

    /// The same with what guards look at.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: Attribute) -> Self {
        match self.attributes.iter_mut().find(|(known, _)| *known == name) {
            Some(slot) => slot.1 = value,
            None => self.attributes.push((name, value)),
        }
        self
    }

    /// A VM in its segment.
    pub fn vm(segment: Self, vm: &Vm) -> Self {
        Self::inside(segment, ResourceKind::Vm, vm.id.as_str(), &vm.full_name())
            .with("class", Attribute::Text(vm.spec.class.to_string()))
            .with("protected", Attribute::Flag(vm.spec.protected))
    }

    /// A snapshot of a VM; `last` when the VM has no other.
    pub fn snapshot(of: Self, vm: &Vm, snapshot: &Snapshot, last: bool) -> Self {
        let name = format!("{}@{}", vm.full_name(), snapshot.name);
        let baseline = vm.status.baseline.as_ref() == Some(&snapshot.id);
        Self::inside(of, ResourceKind::Snapshot, snapshot.id.as_str(), &name)
            .with("baseline", Attribute::Flag(baseline))
            .with("last", Attribute::Flag(last))
            .with("class", Attribute::Text(vm.spec.class.to_string()))
    }

    /// What stands for a thing of this kind that is not there: who may do the action to it may do it anywhere, and
    /// may be told that it is not there. Everybody else gets the answer that they get for what they may not touch.
    pub fn absent(kind: ResourceKind, name: &str) -> Self {
        let parent = match kind {
            ResourceKind::Cluster => return Self::cluster(),
            ResourceKind::Listing => return Self::listing(),
            ResourceKind::Vm | ResourceKind::Schedule => Self::absent(ResourceKind::Segment, name),
            ResourceKind::Snapshot => Self::absent(ResourceKind::Vm, name),
            ResourceKind::Token => Self::absent(ResourceKind::User, name),
            _ => Self::cluster(),
        };
        let mut absent = Self::inside(parent, kind, ABSENT_ID, name);
        if name.is_empty() {
            kind.noun().clone_into(&mut absent.label);
        }
        absent
    }

    /// What kind it is.
    pub const fn kind(&self) -> ResourceKind {
        self.kind
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// `vm:default/books`, for the audit.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The segment that it is, or is in.
    pub fn segment(&self) -> Option<SegmentId> {
        let mut next = Some(self);
        while let Some(thing) = next {
            if thing.kind == ResourceKind::Segment {
                return thing.id.parse().ok();
            }
            next = thing.parent.as_deref();
        }
        None
    }

    /// Whether it is an image that is for all segments.
    pub(super) fn is_for_all(&self) -> bool {
        self.attributes.contains(&("for_all", Attribute::Flag(true)))
    }

    /// Whether it is this segment, or in it, however deep.
    pub(super) fn is_within(&self, segment: &SegmentId) -> bool {
        let mut next = Some(self);
        while let Some(thing) = next {
            if thing.kind == ResourceKind::Segment && thing.id == segment.as_str() {
                return true;
            }
            next = thing.parent.as_deref();
        }
        false
    }
}

/// What guards look at, as it is of a thing of which nothing special is known.
fn usual_attributes(kind: ResourceKind) -> Vec<(&'static str, Attribute)> {
    let no = Attribute::Flag(false);
    let class = Attribute::Text(STANDARD_CLASS.to_owned());
    match kind {
        ResourceKind::Image => vec![("for_all", no)],
        ResourceKind::Vm => vec![("class", class), ("protected", no)],
        ResourceKind::Snapshot => vec![("baseline", no.clone()), ("last", no), ("class", class)],
        ResourceKind::Policy => vec![("active", no)],
        _ => Vec::new(),
    }
}
