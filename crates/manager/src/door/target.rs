//! What a route is about: found by what the path (or the body) names, with what it is in for the policies.
//!
//! A handler's signature names one of these types, and so says what the door has to find and to ask about.

use std::sync::Arc;

use berth_api::endpoint::Endpoint;
use berth_api::manager::{
    CertificateRenew, HostEnrol, HostPath, ImageCreate, ImagePartPath, OperationPath, RepositoryCreate,
    RepositoryPath, RestoreVm, ScheduleCreate, SchedulePath, Segment, SegmentCreate, SegmentPath,
    SnapshotPath, Token, TokenPath, User, UserPath, VmCreate, VmPath, VmRestore, WhoCan,
};
use berth_model::host::Host;
use berth_model::image::Image;
use berth_model::operation::Operation;
use berth_model::repository::Repository;
use berth_model::schedule::Schedule;
use berth_model::snapshot::Snapshot;
use berth_model::vm::Vm;
use berth_model::{Problem, ProblemCode, SegmentId, UserId};

use super::Input;
use crate::auth::Principal;
use crate::auth::accounts::TokenRow;
use crate::cluster::Cluster;
use crate::policy::book::DEPTH_MAX;
use crate::policy::{Attribute, Resource, ResourceKind};
use crate::records::Row;
use crate::{schedules, workflow};

pub mod access;

pub use access::{GrantedIn, TheApproval, TheGrant, ThePolicy, TheRole, TheTeam};

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

/// The list of what the caller may see; the handler filters it.
pub struct TheList;

impl<E: Endpoint> Target<E> for TheList {
    const KIND: ResourceKind = ResourceKind::Listing;
    fn find(_: &Cluster, _: &Principal, _: &Input<E>) -> Result<Located<Self>, Problem> {
        Ok(Located { resource: Resource::listing(), target: Self })
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
        named_snapshot(cluster, &input.path.vm, &input.path.snapshot)
    }
}

/// The snapshot that a VM is to be put back to: the one that the body names, the newest undo snapshot if that is what the
/// body wants, or the VM's baseline.
pub struct ToRestore(pub TheSnapshot);

impl Target<VmRestore> for ToRestore {
    const KIND: ResourceKind = ResourceKind::Snapshot;
    fn find(cluster: &Cluster, _: &Principal, input: &Input<VmRestore>) -> Result<Located<Self>, Problem> {
        let found = snapshot(cluster, &input.path.vm, &input.body)?;
        Ok(Located { resource: found.resource, target: Self(found.target) })
    }
}

/// A snapshot of a VM by id or name.
pub fn named_snapshot(cluster: &Cluster, vm_name: &str, name: &str) -> Result<Located<TheSnapshot>, Problem> {
    let named = RestoreVm { snapshot: Some(name.to_owned()), ..RestoreVm::default() };
    snapshot(cluster, vm_name, &named)
}

/// A snapshot of a VM, as a restore would have it.
fn snapshot(cluster: &Cluster, vm_name: &str, wish: &RestoreVm) -> Result<Located<TheSnapshot>, Problem> {
    let vm = vm(cluster, vm_name)?;
    let TheVm(row) = vm.target;
    let found = workflow::restore::wanted(&cluster.records, &row, wish)?;
    let is_last = cluster.records.snapshots_of(&row.value.id).len() == 1;
    let resource = Resource::snapshot(vm.resource, &row, &found, is_last);
    Ok(Located { resource, target: TheSnapshot { vm: row, snapshot: found } })
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

/// What a query names: the cluster, or a VM, segment, host, image or user. It is asked about as what it is in: the
/// segment, or the cluster.
pub struct TheNamed(pub Resource);

impl Target<WhoCan> for TheNamed {
    const KIND: ResourceKind = ResourceKind::Segment;
    fn find(cluster: &Cluster, _: &Principal, input: &Input<WhoCan>) -> Result<Located<Self>, Problem> {
        let Some(text) = &input.query.resource else {
            return Ok(Located { resource: Resource::cluster(), target: Self(Resource::cluster()) });
        };
        let named = all_named(cluster, text).into_iter().next();
        let named = named.ok_or_else(|| Problem::not_found("thing", text))?;
        let around = match named.segment() {
            Some(segment) => segment_resource(cluster, &segment),
            None => Resource::cluster(),
        };
        Ok(Located { resource: around, target: Self(named) })
    }
}

/// What a new segment is to be inside of: another segment, or the cluster.
pub struct Around(pub Option<Arc<Row<Segment>>>);

impl Target<SegmentCreate> for Around {
    const KIND: ResourceKind = ResourceKind::Segment;
    fn find(
        cluster: &Cluster,
        _: &Principal,
        input: &Input<SegmentCreate>,
    ) -> Result<Located<Self>, Problem> {
        let found = segment_or_cluster(cluster, input.body.parent.as_deref())?;
        Ok(Located { resource: found.resource, target: Self(found.target) })
    }
}

/// A segment by id or name; the cluster, if none is named.
pub(super) fn segment_or_cluster(
    cluster: &Cluster,
    name: Option<&str>,
) -> Result<Located<Option<Arc<Row<Segment>>>>, Problem> {
    let Some(name) = name else { return Ok(Located { resource: Resource::cluster(), target: None }) };
    let found = segment(cluster, name)?;
    Ok(Located { resource: found.resource, target: Some(found.target.0) })
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

/// A repository that the path names.
pub struct TheRepository(pub Arc<Row<Repository>>);

impl<E: Endpoint<Path = RepositoryPath>> Target<E> for TheRepository {
    const KIND: ResourceKind = ResourceKind::Repository;
    fn find(cluster: &Cluster, _: &Principal, input: &Input<E>) -> Result<Located<Self>, Problem> {
        repository(cluster, &input.path.repository)
    }
}

/// Where a new repository is to be usable: in a segment, or in all of them.
pub struct ForRepository(pub Option<SegmentId>);

impl Target<RepositoryCreate> for ForRepository {
    const KIND: ResourceKind = ResourceKind::Segment;
    fn find(
        cluster: &Cluster,
        _: &Principal,
        input: &Input<RepositoryCreate>,
    ) -> Result<Located<Self>, Problem> {
        let found = segment_or_cluster(cluster, input.body.segment.as_deref())?;
        Ok(Located {
            resource: found.resource,
            target: Self(found.target.map(|segment| segment.value.id.clone())),
        })
    }
}

/// A repository by id or name.
pub(super) fn repository(cluster: &Cluster, name: &str) -> Result<Located<TheRepository>, Problem> {
    let found = cluster.records.find_repository(name)?;
    Ok(Located { resource: repository_resource(cluster, &found), target: TheRepository(found) })
}

/// A repository in its segment, or in the cluster if it is the cluster's.
pub fn repository_resource(cluster: &Cluster, repository: &Repository) -> Resource {
    let parent = match &repository.segment {
        Some(segment) => segment_resource(cluster, segment),
        None => Resource::cluster(),
    };
    Resource::inside(parent, ResourceKind::Repository, repository.id.as_str(), repository.name.as_str())
}

/// A schedule that the path names.
pub struct TheSchedule(pub Arc<Row<Schedule>>);

impl<E: Endpoint<Path = SchedulePath>> Target<E> for TheSchedule {
    const KIND: ResourceKind = ResourceKind::Schedule;
    fn find(cluster: &Cluster, _: &Principal, input: &Input<E>) -> Result<Located<Self>, Problem> {
        let found = cluster.records.find_schedule(&input.path.schedule)?;
        Ok(Located { resource: schedules::resource(cluster, &found), target: Self(found) })
    }
}

/// What a new schedule is to be about: all of a segment, or one VM.
pub struct ToSchedule {
    /// The segment that it will be in.
    pub segment: SegmentId,
    /// The VM, if it is about one.
    pub vm: Option<Arc<Row<Vm>>>,
    /// What the policies are asked about.
    pub resource: Resource,
}

impl Target<ScheduleCreate> for ToSchedule {
    const KIND: ResourceKind = ResourceKind::Segment;
    fn find(
        cluster: &Cluster,
        _: &Principal,
        input: &Input<ScheduleCreate>,
    ) -> Result<Located<Self>, Problem> {
        let (segment, vm, resource) = match (&input.body.segment, &input.body.vm) {
            (Some(name), None) => {
                let found = segment(cluster, name)?;
                (found.target.0.value.id.clone(), None, found.resource)
            }
            (None, Some(name)) => {
                let found = vm(cluster, name)?;
                (found.target.0.segment.clone(), Some(found.target.0), found.resource)
            }
            _ => return Err(Problem::field("segment", "", "either a segment or a vm")),
        };
        let target = Self { segment, vm, resource: resource.clone() };
        Ok(Located { resource, target })
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
        Ok(Located { resource: token_resource(&token.token), target: Self(token) })
    }
}

/// A token, which is its owner's.
pub fn token_resource(token: &Token) -> Resource {
    let owner = Resource::of_cluster(ResourceKind::User, token.user.as_str(), token.user.as_str());
    Resource::inside(owner, ResourceKind::Token, token.id.as_str(), token.id.as_str())
}

/// A VM by id or `segment/name`.
pub(super) fn vm(cluster: &Cluster, name: &str) -> Result<Located<TheVm>, Problem> {
    let found = cluster.records.find_vm(name)?;
    Ok(Located { resource: vm_resource(cluster, &found), target: TheVm(found) })
}

/// A host as something that an action is about.
pub fn host_resource(host: &Host) -> Resource {
    Resource::of_cluster(ResourceKind::Host, host.id.as_str(), host.name.as_str())
}

/// A host by id or name.
pub(super) fn host(cluster: &Cluster, name: &str) -> Result<Located<TheHost>, Problem> {
    let found = cluster.records.find_host(name)?;
    Ok(Located { resource: host_resource(&found), target: TheHost(found) })
}

/// An image by id, `segment/name` or name.
pub(super) fn image(cluster: &Cluster, name: &str) -> Result<Located<TheImage>, Problem> {
    let found = cluster.records.find_image(name)?;
    Ok(Located { resource: image_resource(cluster, &found), target: TheImage(found) })
}

/// The image that a text means in a segment.
pub(super) fn image_for(
    cluster: &Cluster,
    segment: &SegmentId,
    name: &str,
) -> Result<Located<TheImage>, Problem> {
    let found = cluster.records.find_image_for(segment, name)?;
    Ok(Located { resource: image_resource(cluster, &found), target: TheImage(found) })
}

/// A segment by id or name.
pub(super) fn segment(cluster: &Cluster, name: &str) -> Result<Located<TheSegment>, Problem> {
    let found = cluster.records.find_segment(name)?;
    let resource = segment_resource(cluster, &found.value.id);
    Ok(Located { resource, target: TheSegment(found) })
}

/// A user by id or name.
///
/// # Errors
/// That there is none.
pub fn user(cluster: &Cluster, text: &str) -> Result<Arc<Row<User>>, Problem> {
    access::named::<User, UserId>(cluster, text)
}

/// A segment with those that it is inside of.
pub fn segment_resource(cluster: &Cluster, id: &SegmentId) -> Resource {
    let mut chain = Vec::new();
    let mut next = Some(id.clone());
    while let Some(id) = next.take().filter(|_| chain.len() <= DEPTH_MAX) {
        let row = cluster.records.get::<Segment>(id.as_str());
        let name = row.as_ref().map_or_else(|| id.to_string(), |row| row.name.to_string());
        next = row.and_then(|row| row.parent.clone());
        chain.push((id, name));
    }
    let outermost = Resource::cluster();
    chain.into_iter().rev().fold(outermost, |above, (id, name)| {
        Resource::inside(above, ResourceKind::Segment, id.as_str(), &name)
    })
}

/// A VM in its segment.
pub fn vm_resource(cluster: &Cluster, vm: &Vm) -> Resource {
    Resource::vm(segment_resource(cluster, &vm.segment), vm)
}

/// An image in its segment, or in the cluster if it is for all.
pub fn image_resource(cluster: &Cluster, image: &Image) -> Resource {
    let parent = match &image.segment {
        Some(segment) => segment_resource(cluster, segment),
        None => Resource::cluster(),
    };
    Resource::inside(parent, ResourceKind::Image, image.id.as_str(), &cluster.records.full_name_of(image))
        .with("for_all", Attribute::Flag(image.segment.is_none()))
}

/// An operation is in what it changes, as long as that is there.
pub fn operation_resource(cluster: &Cluster, operation: &Operation) -> Resource {
    let vm = operation.vm.as_ref().and_then(|id| cluster.records.get::<Vm>(id.as_str()));
    let image = operation.image.as_ref().and_then(|id| cluster.records.get::<Image>(id.as_str()));
    let parent = match (vm, image) {
        (Some(vm), _) => vm_resource(cluster, &vm),
        (None, Some(image)) => image_resource(cluster, &image),
        (None, None) => match &operation.segment {
            Some(segment) => segment_resource(cluster, segment),
            None => Resource::cluster(),
        },
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

pub(super) fn absent_repository(name: &str) -> Resource {
    Resource::absent(ResourceKind::Repository, name)
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
