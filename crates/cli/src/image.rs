//! `berth image`: immutable disks and kernels that VMs start from.

mod import;

use berth_api::endpoint::Nothing;
use berth_api::manager::{ImageDelete, ImageList, ImagePath, ImageShow, PageQuery};
use berth_model::access::Action;
use berth_model::image::{Image, PartRole};
use clap::Subcommand;

use crate::arguments::{ChangeArguments, ListArguments};
use crate::exit::Failure;
use crate::lookup::SegmentNames;
use crate::output::{Facts, NOTHING, Table, instant, or_nothing, word};
use crate::session::Session;
use crate::{units, wait};

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Bring an image in from files of this machine
    Import(import::Arguments),
    /// List the images
    List(ListArguments),
    /// Show an image
    Show {
        /// Its name (SEGMENT/NAME for one of a segment) or id
        image: String,
    },
    /// Delete an image that no VM needs
    Delete {
        /// Its name (SEGMENT/NAME for one of a segment) or id
        image: String,
        #[command(flatten)]
        change: ChangeArguments,
    },
}

/// Does it.
///
/// # Errors
/// When the manager refuses or can't be reached, and the operation's failure.
pub async fn run(session: &Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::Import(arguments) => import::run(session, arguments).await,
        Verb::List(arguments) => {
            let query = |limit, cursor| PageQuery { limit, cursor };
            let images = session.pages::<ImageList, _>(&Nothing {}, arguments.limit, query).await?;
            let segments = segments_of(session, &images).await;
            session.output.list(&images, || table(&images, &segments))
        }
        Verb::Show { image } => {
            let image = session.ask::<ImageShow>(&ImagePath { image }, &Nothing {}).await?;
            let segments = segments_of(session, std::slice::from_ref(&image)).await;
            session.output.one(&image, || facts(&image, &segments))
        }
        Verb::Delete { image, change } => delete(session, image, change).await,
    }
}

/// The names of the segments that the images are of. For nobody's sake when all are for all.
async fn segments_of(session: &Session, images: &[Image]) -> SegmentNames {
    if images.iter().any(|image| image.segment.is_some()) {
        SegmentNames::load(session).await
    } else {
        SegmentNames::default()
    }
}

/// What the image is called: `segment/name`, or its name if it is for all.
fn full_name(image: &Image, segments: &SegmentNames) -> String {
    match &image.segment {
        Some(segment) => format!("{}/{}", segments.of(segment), image.name),
        None => image.name.to_string(),
    }
}

async fn delete(session: &Session, image: String, change: ChangeArguments) -> Result<(), Failure> {
    let path = ImagePath { image };
    if change.dry_run {
        let found = session.ask::<ImageShow>(&path, &Nothing {}).await?;
        let size = units::bytes(size_bytes(&found));
        let summary = format!("would delete image {} ({size}), if no VM needs it", found.name);
        return session.would(Action::ImageDelete, Some(found.id.as_str()), &summary).await;
    }
    let reply = session.ask::<ImageDelete>(&path, &Nothing {}).await?;
    wait::carry_through_and_tell(session, change, reply, |over| format!("image {} is deleted", over.subject))
        .await
}

fn size_bytes(image: &Image) -> u64 {
    image.parts.iter().map(|part| part.size_bytes).sum()
}

fn table(images: &[Image], segments: &SegmentNames) -> Table {
    Table::of(&["NAME", "STATE", "PARTS", "SIZE", "DISK", "MADE"], images, |image| {
        let parts: Vec<&str> = image.parts.iter().map(|part| part.role.as_str()).collect();
        let disk = image.part(PartRole::Disk).and_then(|part| part.virtual_size_bytes);
        [
            full_name(image, segments),
            word(&image.state),
            if parts.is_empty() { NOTHING.to_owned() } else { parts.join(",") },
            units::bytes(size_bytes(image)),
            or_nothing(disk.map(units::bytes)),
            instant(image.created_at),
        ]
    })
}

fn facts(image: &Image, segments: &SegmentNames) -> Facts {
    let mut facts = Facts::new()
        .with("name", full_name(image, segments))
        .with("id", &image.id)
        .with("state", word(&image.state))
        .with("for segment", image.segment.as_ref().map_or("all".to_owned(), |id| segments.of(id)))
        .with("made", instant(image.created_at));
    for part in &image.parts {
        let arrived = if image.arrived.contains(&part.role) { "" } else { ", not arrived" };
        let size = units::bytes(part.size_bytes);
        facts = facts
            .with(part.role.as_str(), format!("{}, {size}{arrived}", part.format.as_str()))
            .with(format!("{} sha256", part.role.as_str()), &part.sha256);
    }
    let command_line = &image.kernel_command_line;
    facts.with_some("kernel command line", (!command_line.is_empty()).then_some(command_line))
}
