//! An image from another host.

use berth_api::agent::TaskSpec;
use berth_model::image::{Image, PartFormat, PartRole};
use berth_model::{HostId, ProblemCode};

use crate::support::{Host, definition, directory, sha256};

async fn two_hosts() -> (Host, Host) {
    let giver = Host::start().await;
    let mut taker = Host::start_with(directory(), giver.network.clone()).await;
    taker.stop_agent();
    taker.id = HostId::from_entropy([8; 10]);
    taker.start_agent().await;
    taker.peers.add(&giver, &taker.id);
    (giver, taker)
}

fn fetch(image: &Image, from: &Host) -> TaskSpec {
    TaskSpec::FetchImage {
        image: image.clone(),
        pool: "local".parse().expect("name"),
        from: from.id.clone(),
        from_pool: "local".parse().expect("name"),
        from_address: "198.18.5.1:7443".into(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_is_fetched_from_another_host_and_checked_again() {
    let (giver, taker) = two_hosts().await;
    let parts = [
        (PartRole::Kernel, PartFormat::Raw, vec![1u8; 700_000]),
        (PartRole::Initrd, PartFormat::Raw, vec![2u8; 5]),
    ];
    let image = definition(1, &parts).image;
    for (role, _, bytes) in &parts {
        giver.upload(&image.id, *role, "raw", bytes.clone(), sha256(bytes)).await.expect("uploaded");
    }
    for _ in 0..2 {
        taker.task_of(None, 0, fetch(&image, &giver)).await.expect("fetched");
    }
    let kernel = taker.pool().join("images").join(image.id.as_str()).join("kernel");
    assert_eq!(std::fs::read(kernel).expect("there"), parts[0].2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_gives_other_bytes_is_not_believed() {
    let (giver, taker) = two_hosts().await;
    let parts = [(PartRole::Kernel, PartFormat::Raw, vec![1u8; 700_000])];
    let image = definition(1, &parts).image;
    let problem = taker.task_of(None, 0, fetch(&image, &giver)).await.expect_err("not there");
    assert_eq!(problem.code, ProblemCode::NotFound);
    giver
        .upload(&image.id, PartRole::Kernel, "raw", parts[0].2.clone(), sha256(&parts[0].2))
        .await
        .expect("uploaded");
    let kernel = giver.pool().join("images").join(image.id.as_str()).join("kernel");
    for wrong in [vec![3u8; 700_000], vec![1u8; 699_999], vec![1u8; 700_001]] {
        std::fs::remove_file(&kernel).expect("removed");
        std::fs::write(&kernel, wrong).expect("written");
        taker.task_of(None, 0, fetch(&image, &giver)).await.expect_err("other bytes");
        assert_eq!(taker.files("pool/images"), Vec::<String>::new());
    }
}
