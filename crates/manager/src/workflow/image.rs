//! Stub.
super::stub! { DeleteImage ImageDelete }

use crate::records::{Row, UniqueName};
use berth_model::ImageId;
use berth_model::image::Image;

/// What an operation on an image holds, so that there is one at a time.
pub(crate) fn slot(image: &Row<Image>) -> UniqueName {
    slot_of(&image.value.id)
}

/// The same by id.
pub(crate) fn slot_of(image: &ImageId) -> UniqueName {
    let name = image.as_str().parse().expect("an id has the form of a name");
    UniqueName::in_cluster("image-slot", &name)
}
