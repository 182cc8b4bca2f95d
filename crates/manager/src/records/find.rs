//! From what people call a thing to the thing: an id, or a name.

use std::sync::Arc;

use berth_api::manager::Segment;
use berth_model::host::Host;
use berth_model::image::Image;
use berth_model::name::Name;
use berth_model::repository::Repository;
use berth_model::schedule::Schedule;
use berth_model::snapshot::Snapshot;
use berth_model::vm::Vm;
use berth_model::{HostId, ImageId, Problem, RepositoryId, ScheduleId, SegmentId, SnapshotId, VmId};

use super::copy::Row;
use super::name::UniqueName;
use super::noun::Record;
use super::{ImagePlace, Records};

impl Records {
    /// A VM by its id or `segment/name`.
    ///
    /// # Errors
    /// That there is none.
    pub fn find_vm(&self, text: &str) -> Result<Arc<Row<Vm>>, Problem> {
        let missing = || Problem::not_found("vm", text);
        if text.parse::<VmId>().is_ok() {
            return self.get(text).ok_or_else(missing);
        }
        let (segment, name) = text.split_once('/').ok_or_else(|| {
            missing().at("vm", text, "an id, or a segment and a name with a slash in between")
        })?;
        let segment = self.find_segment(segment).map_err(|_| missing())?;
        let name: Name = name.parse().map_err(|_| missing())?;
        self.id_of(&UniqueName::vm(&segment.id_typed(), &name))
            .and_then(|id| self.get(&id))
            .ok_or_else(missing)
    }

    /// A schedule by its id or `segment/name`.
    ///
    /// # Errors
    /// That there is none.
    pub fn find_schedule(&self, text: &str) -> Result<Arc<Row<Schedule>>, Problem> {
        let missing = || Problem::not_found("schedule", text);
        if text.parse::<ScheduleId>().is_ok() {
            return self.get(text).ok_or_else(missing);
        }
        let (segment, name) = text.split_once('/').ok_or_else(missing)?;
        let segment = self.find_segment(segment).map_err(|_| missing())?;
        let name: Name = name.parse().map_err(|_| missing())?;
        let id = self.id_of(&UniqueName::schedule(&segment.id_typed(), &name)).ok_or_else(missing)?;
        self.get(&id).ok_or_else(missing)
    }

    /// A host by its id or name.
    ///
    /// # Errors
    /// That there is none.
    pub fn find_host(&self, text: &str) -> Result<Arc<Row<Host>>, Problem> {
        self.find_in_cluster(text, text.parse::<HostId>().is_ok())
    }

    /// An image by its id, by `segment/name`, or, if it is for all, by its name.
    ///
    /// # Errors
    /// That there is none.
    pub fn find_image(&self, text: &str) -> Result<Arc<Row<Image>>, Problem> {
        let Some((segment, name)) = text.split_once('/') else {
            return self.find_in_cluster(text, text.parse::<ImageId>().is_ok());
        };
        let missing = || Problem::not_found("image", text);
        let segment = self.find_segment(segment).map_err(|_| missing())?;
        let name: Name = name.parse().map_err(|_| missing())?;
        self.image_named(Some(&segment.value.id), &name).ok_or_else(missing)
    }

    /// The image that a text means in a segment: one of the segment's own of that name, else as everywhere.
    ///
    /// # Errors
    /// That there is none.
    pub fn find_image_for(&self, segment: &SegmentId, text: &str) -> Result<Arc<Row<Image>>, Problem> {
        let name: Option<Name> = text.parse().ok();
        let own = name.and_then(|name| self.image_named(Some(segment), &name));
        own.map_or_else(|| self.find_image(text), Ok)
    }

    fn image_named(&self, segment: Option<&SegmentId>, name: &Name) -> Option<Arc<Row<Image>>> {
        self.id_of(&UniqueName::image(segment, name)).and_then(|id| self.get(&id))
    }

    /// What people call an image: `segment/name`, or its name if it is for all.
    pub fn full_name_of(&self, image: &Image) -> String {
        let Some(segment) = &image.segment else { return image.name.to_string() };
        match self.get::<Segment>(segment.as_str()) {
            Some(row) => format!("{}/{}", row.name, image.name),
            None => format!("{segment}/{}", image.name),
        }
    }

    /// A repository by its id or name.
    ///
    /// # Errors
    /// That there is none.
    pub fn find_repository(&self, text: &str) -> Result<Arc<Row<Repository>>, Problem> {
        self.find_in_cluster(text, text.parse::<RepositoryId>().is_ok())
    }

    /// A segment by its id or name.
    ///
    /// # Errors
    /// That there is none.
    pub fn find_segment(&self, text: &str) -> Result<Arc<Row<Segment>>, Problem> {
        self.find_in_cluster(text, text.parse::<SegmentId>().is_ok())
    }

    /// A VM's snapshot by its id or name.
    ///
    /// # Errors
    /// That there is none.
    pub fn find_snapshot(&self, vm: &VmId, text: &str) -> Result<Arc<Row<Snapshot>>, Problem> {
        let missing = || Problem::not_found("snapshot", text);
        if text.parse::<SnapshotId>().is_ok() {
            return self.get(&format!("{vm}/{text}")).ok_or_else(missing);
        }
        let name: Name = text.parse().map_err(|_| missing())?;
        let id = self.id_of(&UniqueName::snapshot(vm, &name)).ok_or_else(missing)?;
        self.get(&format!("{vm}/{id}")).ok_or_else(missing)
    }

    /// A VM's snapshots, oldest first.
    pub fn snapshots_of(&self, vm: &VmId) -> Vec<Arc<Row<Snapshot>>> {
        let mut snapshots = self.list_below::<Snapshot>(&format!("{vm}/"));
        snapshots.sort_by(|a, b| (a.created_at, &a.value.id).cmp(&(b.created_at, &b.value.id)));
        snapshots
    }

    /// Where an image is whole.
    pub fn places_of(&self, image: &ImageId) -> Vec<Arc<Row<ImagePlace>>> {
        self.list_below::<ImagePlace>(&format!("{image}/"))
    }

    fn find_in_cluster<T: Record>(&self, text: &str, is_id: bool) -> Result<Arc<Row<T>>, Problem> {
        let missing = || Problem::not_found(T::NOUN, text);
        if is_id && let Some(row) = self.get(text) {
            return Ok(row);
        }
        // `host-0000000000000000` has the look of an id and is a good name all the same.
        let name: Name = text.parse().map_err(|_| missing())?;
        self.id_of(&UniqueName::in_cluster(T::NOUN, &name)).and_then(|id| self.get(&id)).ok_or_else(missing)
    }
}

impl Row<Segment> {
    fn id_typed(&self) -> SegmentId {
        self.value.id.clone()
    }
}
