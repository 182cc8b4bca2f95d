use super::*;
use crate::fake::Fake;
use berth_model::image::ImageState;
use berth_model::{ImageId, Timestamp};

const HELLO_SHA256: &str = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

fn arguments(line: &[&str]) -> Arguments {
    use clap::Parser;
    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }
    Line::parse_from([&["import"], line].concat()).arguments
}

fn image(state: ImageState) -> Image {
    Image {
        id: ImageId::from_entropy([1; 10]),
        name: "probe".parse().expect("a name"),
        segment: None,
        state,
        parts: Vec::new(),
        kernel_command_line: String::new(),
        arrived: Vec::new(),
        created_at: Timestamp::default(),
    }
}

fn hello() -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("disk.raw");
    std::fs::write(&path, "hello").expect("written");
    let path = path.to_str().expect("text").to_owned();
    (directory, path)
}

#[tokio::test]
async fn an_image_is_declared_with_its_checksum_and_sent() {
    let (_directory, path) = hello();
    let id = ImageId::from_entropy([1; 10]);
    let fake = Fake::new()
        .answer("POST /v1/images", &image(ImageState::Uploading))
        .answer(&format!("PUT /v1/images/{id}/parts/disk"), &image(ImageState::Ready));
    let line = [&path, "--name", "probe", "--format", "raw", "--sha256", HELLO_SHA256];
    run(&fake.session(), arguments(&line)).await.expect("imported");
    let asked = fake.asked();
    let declared: CreateImage = serde_json::from_slice(&asked[0].body).expect("a wish");
    assert_eq!(declared.parts[0].sha256, HELLO_SHA256);
    assert_eq!((declared.parts[0].size_bytes, declared.parts[0].format), (5, PartFormat::Raw));
    assert_eq!(asked[1].body, b"hello");
    assert!(fake.said().contains("image probe is there"));
}

#[tokio::test]
async fn a_wrong_checksum_is_found_before_anything_is_sent() {
    let (_directory, path) = hello();
    let fake = Fake::new();
    let line = [&path, "--name", "probe", "--format", "raw", "--sha256", &"0".repeat(64)];
    let failure = run(&fake.session(), arguments(&line)).await.expect_err("refused");
    assert_eq!(failure.problem().expect("a problem").code, ProblemCode::BadImage);
    assert!(fake.asked().is_empty());
}

#[tokio::test]
async fn nothing_is_left_of_an_image_that_did_not_arrive() {
    let (_directory, path) = hello();
    let id = ImageId::from_entropy([1; 10]);
    let refused = Problem::new(ProblemCode::BadImage, "it names a backing file");
    let fake = Fake::new()
        .answer("POST /v1/images", &image(ImageState::Uploading))
        .refuse(&format!("PUT /v1/images/{id}/parts/disk"), &refused)
        .refuse(&format!("DELETE /v1/images/{id}"), &refused);
    let failure = run(&fake.session(), arguments(&[&path, "--name", "probe", "--format", "qcow2"]))
        .await
        .expect_err("refused");
    let told = failure.problem().expect("a problem");
    assert_eq!((told.code, &told.message), (refused.code, &format!("{path}: it names a backing file")));
    assert_eq!(fake.asked()[2].line, format!("DELETE /v1/images/{id}"));
}

#[test]
fn files_that_are_none_are_refused() {
    let output = Fake::new().session().output;
    for path in ["/nonexistent", "/", "/dev/null"] {
        let arguments = arguments(&[path, "--name", "probe", "--format", "raw"]);
        let failure = sources(&arguments, &mut Reporter::new(&output)).err().expect("refused");
        assert_eq!(failure.code(), 2, "{path}");
    }
}

#[test]
fn the_format_is_always_stated() {
    use clap::{Args as _, Command};
    let command = Arguments::augment_args(Command::new("import"));
    for line in [
        &["import", "a.img", "--name", "a"][..],
        &["import", "--name", "a"],
        &["import", "--name", "a", "--format", "raw"],
        &["import", "--name", "a", "--initrd", "i"],
        &["import", "a.img", "--name", "a", "--format", "vmdk"],
        &["import", "a.img", "--name", "a", "--format", "raw", "--sha256", "abc"],
    ] {
        assert!(command.clone().try_get_matches_from(line).is_err(), "{line:?}");
    }
    for line in [
        &["import", "a.img", "--name", "a", "--format", "raw"][..],
        &["import", "--name", "a", "--kernel", "k", "--initrd", "i", "--append", "-quiet x"],
        &["import", "a.img", "--name", "a", "--format", "qcow2", "--kernel", "k"],
    ] {
        assert!(command.clone().try_get_matches_from(line).is_ok(), "{line:?}");
    }
}
