//! What a route is about: found by what the path (or the body) names, with what it is in for the policies.
//!
//! A handler's signature names one of these types, and so says what the door has to find and to ask about.

use std::sync::Arc;

use berth_api::endpoint::Endpoint;
use berth_api::manager::{
    CertificateRenew, HostEnrol, HostPath, ImageCreate, ImagePartPath, OperationPath, Segment, SegmentPath,
    SnapshotPath, TokenPath, User, UserPath, VmCreate, VmPath,
};
use berth_model::host::Host;
use berth_model::image::Image;
use berth_model::name::Name;
use berth_model::operation::Operation;
use berth_model::snapshot::Snapshot;
use berth_model::vm::Vm;
use berth_model::{Problem, ProblemCode, SegmentId, UserId};

use super::Input;
use crate::auth::Principal;
use crate::auth::accounts::TokenRow;
use crate::cluster::Cluster;
use crate::policy::{Resource, ResourceKind};
use crate::records::{Record, Row, UniqueName};

/// Something that was found, as it is to the policies and as it is to the handler.
pub struct Located<T> {
    /// To the policies.
    pub resource: Resource,
    /// To the handler.
    pub target: T,
}

/// What a route can be about.
pub trait Target<E: Endpoint>: Sized + Send + 'static {
    /// Its kind, for when it is not there.
    const KIND: ResourceKind;

    /// Finds it.
    ///
    /// # Errors
    /// That it is not there, or is named in a way that nothing can be.
    fn find(cluster: &Cluster, principal: &Principal, input: &Input<E>) -> Result<Located<Self>, Problem>;

    /// The join token that the request shows, on the one route that takes any.
    fn join_token(_input: &Input<E>) -> Option<&str> {
        None
    }
}

/// The cluster as a whole.
pub struct TheCluster;

impl<E: Endpoint> Target<E> for TheCluster {
    const KIND: ResourceKind = ResourceKind::Cluster;
    fn find(_: &Cluster, _: &Principal, _: &Input<E>) -> Result<Located<Self>, Problem> {
        Ok(Located { resource: Resource::cluster(), target: Self })
    }
}

/// A VM that the path names.
pub struct TheVm(pub Arc<Row<Vm>>);

impl<E: Endpoint<Path = VmPath>> Target<E> for TheVm {
    const KIND: ResourceKind = ResourceKind::Vm;
    fn find(cluster: &Cluster, _: &Principal, input: &Input<E>) -> Result<Located<Self>, Problem> {
        vm(cluster, &input.path.vm)
    }
}

/// A VM whose snapshots are asked about, or a snapshot of it.
pub struct TheSnapshot {
    /// The VM.
    pub vm: Arc<Row<Vm>>,
    /// The snapshot.
    pub snapshot: Arc<Row<Snapshot>>,
}

impl<E: Endpoint<Path = SnapshotPath>> Target<E> for TheSnapshot {
    const KIND: ResourceKind = ResourceKind::Snapshot;
    fn find(cluster: &Cluster, _: &Principal, input: &Input<E>) -> Result<Located<Self>, Problem> {
        let vm = vm(cluster, &input.path.vm)?;
        let snapshot = cluster.records.find_snapshot(&vm.target.0.value.id, &input.path.snapshot)?;
        let name = format!("{}@{}", vm.target.0.full_name(), snapshot.name);
        let resource =
            Resource::inside(vm.resource, ResourceKind::Snapshot, snapshot.value.id.as_str(), &name);
        Ok(Located { resource, target: Self { vm: vm.target.0, snapshot } })
    }
}

/// A host that the path names.
pub struct TheHost(pub Arc<Row<Host>>);

impl<E: Endpoint<Path = HostPath>> Target<E> for TheHost {
    const KIND: ResourceKind = ResourceKind::Host;
    fn find(cluster: &Cluster, _: &Principal, input: &Input<E>) -> Result<Located<Self>, Problem> {
        host(cluster, &input.path.host)
    }
}

/// The host that asks, by its certificate.
pub struct TheHostItself(pub Arc<Row<Host>>);

impl Target<CertificateRenew> for TheHostItself {
    const KIND: ResourceKind = ResourceKind::Host;
    fn find(
        cluster: &Cluster,
        principal: &Principal,
        _: &Input<CertificateRenew>,
    ) -> Result<Located<Self>, Problem> {
        let Principal::Host(id) = principal else {
            return Err(Problem::not_found("host", principal.actor()));
        };
        let found = host(cluster, id.as_str())?;
        Ok(Located { resource: found.resource, target: Self(found.target.0) })
    }
}

/// The cluster, for a machine that wants to join it.
pub struct Joining;

impl Target<HostEnrol> for Joining {
    const KIND: ResourceKind = ResourceKind::Cluster;
    fn find(_: &Cluster, _: &Principal, _: &Input<HostEnrol>) -> Result<Located<Self>, Problem> {
        Ok(Located { resource: Resource::cluster(), target: Self })
    }
    fn join_token(input: &Input<HostEnrol>) -> Option<&str> {
        Some(&input.body.token)
    }
}

/// A segment that the path names.
pub struct TheSegment(pub Arc<Row<Segment>>);

impl<E: Endpoint<Path = SegmentPath>> Target<E> for TheSegment {
    const KIND: ResourceKind = ResourceKind::Segment;
    fn find(cluster: &Cluster, _: &Principal, input: &Input<E>) -> Result<Located<Self>, Problem> {
        segment(cluster, &input.path.segment)
    }
}

/// The segment that a new VM is to be in.
pub struct IntoSegment(pub Arc<Row<Segment>>);

impl Target<VmCreate> for IntoSegment {
    const KIND: ResourceKind = ResourceKind::Segment;
    fn find(cluster: &Cluster, _: &Principal, input: &Input<VmCreate>) -> Result<Located<Self>, Problem> {
        let found = segment(cluster, &input.body.segment)?;
        Ok(Located { resource: found.resource, target: Self(found.target.0) })
    }
}

/// Where a new image is to be usable: in a segment, or in all of them.
pub struct ForImage(pub Option<SegmentId>);

impl Target<ImageCreate> for ForImage {
    const KIND: ResourceKind = ResourceKind::Segment;
    fn find(cluster: &Cluster, _: &Principal, input: &Input<ImageCreate>) -> Result<Located<Self>, Problem> {
        let Some(name) = &input.body.segment else {
            return Ok(Located { resource: Resource::cluster(), target: Self(None) });
        };
        let found = segment(cluster, name)?;
        Ok(Located { resource: found.resource, target: Self(Some(found.target.0.value.id.clone())) })
    }
}

/// An image that the path names.
pub struct TheImage(pub Arc<Row<Image>>);

impl Target<berth_api::manager::ImageShow> for TheImage {
    const KIND: ResourceKind = ResourceKind::Image;
    fn find(
        cluster: &Cluster,
        _: &Principal,
        input: &Input<berth_api::manager::ImageShow>,
    ) -> Result<Located<Self>, Problem> {
        image(cluster, &input.path.image)
    }
}

impl Target<berth_api::manager::ImageDelete> for TheImage {
    const KIND: ResourceKind = ResourceKind::Image;
    fn find(
        cluster: &Cluster,
        _: &Principal,
        input: &Input<berth_api::manager::ImageDelete>,
    ) -> Result<Located<Self>, Problem> {
        image(cluster, &input.path.image)
    }
}

/// An image that a part is uploaded to.
pub struct ThePartsImage(pub Arc<Row<Image>>);

impl<E: Endpoint<Path = ImagePartPath>> Target<E> for ThePartsImage {
    const KIND: ResourceKind = ResourceKind::Image;
    fn find(cluster: &Cluster, _: &Principal, input: &Input<E>) -> Result<Located<Self>, Problem> {
        let found = image(cluster, &input.path.image)?;
        Ok(Located { resource: found.resource, target: Self(found.target.0) })
    }
}

/// An operation that the path names.
pub struct TheOperation(pub Operation);

impl<E: Endpoint<Path = OperationPath>> Target<E> for TheOperation {
    const KIND: ResourceKind = ResourceKind::Operation;
    fn find(cluster: &Cluster, _: &Principal, input: &Input<E>) -> Result<Located<Self>, Problem> {
        let operation = cluster.operations.get(&input.path.operation)?;
        Ok(Located { resource: operation_resource(cluster, &operation), target: Self(operation) })
    }
}

/// A user that the path names.
pub struct TheUser(pub Arc<Row<User>>);

impl<E: Endpoint<Path = UserPath>> Target<E> for TheUser {
    const KIND: ResourceKind = ResourceKind::User;
    fn find(cluster: &Cluster, _: &Principal, input: &Input<E>) -> Result<Located<Self>, Problem> {
        let user = user(cluster, &input.path.user)?;
        let resource = Resource::of_cluster(ResourceKind::User, user.id.as_str(), user.name.as_str());
        Ok(Located { resource, target: Self(user) })
    }
}

/// A token that the path names.
pub struct TheToken(pub Arc<Row<TokenRow>>);

impl<E: Endpoint<Path = TokenPath>> Target<E> for TheToken {
    const KIND: ResourceKind = ResourceKind::Token;
    fn find(cluster: &Cluster, _: &Principal, input: &Input<E>) -> Result<Located<Self>, Problem> {
        let token = cluster.records.require::<TokenRow>(input.path.token.as_str())?;
        let resource = Resource::of_cluster(ResourceKind::Token, &token.id, &token.id);
        Ok(Located { resource, target: Self(token) })
    }
}

/// A VM by id or `segment/name`.
pub(super) fn vm(cluster: &Cluster, name: &str) -> Result<Located<TheVm>, Problem> {
    let found = cluster.records.find_vm(name)?;
    Ok(Located { resource: vm_resource(&found), target: TheVm(found) })
}

/// A host by id or name.
pub(super) fn host(cluster: &Cluster, name: &str) -> Result<Located<TheHost>, Problem> {
    let found = cluster.records.find_host(name)?;
    let resource =
        Resource::of_cluster(ResourceKind::Host, found.value.id.as_str(), found.value.name.as_str());
    Ok(Located { resource, target: TheHost(found) })
}

/// An image by id or name.
pub(super) fn image(cluster: &Cluster, name: &str) -> Result<Located<TheImage>, Problem> {
    let found = cluster.records.find_image(name)?;
    Ok(Located { resource: image_resource(&found), target: TheImage(found) })
}

/// A segment by id or name.
pub(super) fn segment(cluster: &Cluster, name: &str) -> Result<Located<TheSegment>, Problem> {
    let found = cluster.records.find_segment(name)?;
    let resource = segment_resource(&found.value.id, found.value.name.as_str());
    Ok(Located { resource, target: TheSegment(found) })
}

/// A user by id or name.
///
/// # Errors
/// That there is none.
pub fn user(cluster: &Cluster, text: &str) -> Result<Arc<Row<User>>, Problem> {
    let missing = || Problem::not_found(User::NOUN, text);
    if text.parse::<UserId>().is_ok()
        && let Some(row) = cluster.records.get(text)
    {
        return Ok(row);
    }
    let name: Name = text.parse().map_err(|_| missing())?;
    let id = cluster.records.id_of(&UniqueName::in_cluster(User::NOUN, &name)).ok_or_else(missing)?;
    cluster.records.get(&id).ok_or_else(missing)
}

fn segment_resource(id: &SegmentId, name: &str) -> Resource {
    Resource::of_cluster(ResourceKind::Segment, id.as_str(), name)
}

fn vm_resource(vm: &Vm) -> Resource {
    let segment = segment_resource(&vm.segment, vm.segment_name.as_str());
    Resource::inside(segment, ResourceKind::Vm, vm.id.as_str(), &vm.full_name())
}

fn image_resource(image: &Image) -> Resource {
    let parent = match &image.segment {
        Some(segment) => segment_resource(segment, segment.as_str()),
        None => Resource::cluster(),
    };
    Resource::inside(parent, ResourceKind::Image, image.id.as_str(), image.name.as_str())
}

/// An operation is in what it changes, as long as that is there.
fn operation_resource(cluster: &Cluster, operation: &Operation) -> Resource {
    let vm = operation.vm.as_ref().and_then(|id| cluster.records.get::<Vm>(id.as_str()));
    let image = operation.image.as_ref().and_then(|id| cluster.records.get::<Image>(id.as_str()));
    let parent = match (vm, image) {
        (Some(vm), _) => vm_resource(&vm),
        (None, Some(image)) => image_resource(&image),
        (None, None) => Resource::cluster(),
    };
    Resource::inside(parent, ResourceKind::Operation, operation.id.as_str(), operation.id.as_str())
}

pub(super) fn absent_vm(name: &str) -> Resource {
    Resource::absent(ResourceKind::Vm, name)
}

pub(super) fn absent_host(name: &str) -> Resource {
    Resource::absent(ResourceKind::Host, name)
}

pub(super) fn absent_image(name: &str) -> Resource {
    Resource::absent(ResourceKind::Image, name)
}

pub(super) fn absent_segment(name: &str) -> Resource {
    Resource::absent(ResourceKind::Segment, name)
}

/// The one answer to a join token that is not good, whatever is wrong with it.
pub(super) fn bad_join_token() -> Problem {
    Problem::new(
        ProblemCode::Unauthenticated,
        "the join token is not one of this cluster, or has expired: make another with 'berth host join-token'",
    )
}

/// Everything that a text can mean: a VM, segment, host, image or user of that name or id. For questions only.
pub fn all_named(cluster: &Cluster, text: &str) -> Vec<Resource> {
    let user = user(cluster, text)
        .map(|user| Resource::of_cluster(ResourceKind::User, user.id.as_str(), user.name.as_str()));
    let found = [
        vm(cluster, text).map(|found| found.resource),
        segment(cluster, text).map(|found| found.resource),
        host(cluster, text).map(|found| found.resource),
        image(cluster, text).map(|found| found.resource),
        user,
    ];
    found.into_iter().filter_map(Result::ok).collect()
}
