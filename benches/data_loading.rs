//! What the coordinator does for datasets, by criterion: dealing files out, and registering and
//! asking through gRPC on loopback with the journal on disk.
//!
//! Goal: to see what a change does to the time in which a rank learns its files. Not a goal: how
//! fast samples are read; `compare/data_loading.py` measures that.
//!
//! Always holds: what came back is checked, and its CRC-32C is printed: the order of files is the
//! same on every machine and in every version, so it changes only if that promise is broken.
#![expect(clippy::unwrap_used, reason = "a measurement stops at its first surprise")]
#![expect(clippy::print_stdout, reason = "printing is what this program is for")]

use std::time::Duration;

use coordinator::state::assign;
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use dtr_engine::format::checksum::crc32c;
use dtr_proto::FILES_BYTES_MAX;
use dtr_proto::v1;
use dtr_proto::v1::datasets_client::DatasetsClient;
use tonic::transport::Channel;

mod service;

use service::Service;

/// Fewer than a job may have.
const DATASETS_OF_A_JOB: usize = 5_000;

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    let scale = if is_measuring() { Scale::FULL } else { Scale::TINY };
    measure_assign(&mut criterion, &scale);
    measure_service(&mut criterion, &scale);
    criterion.final_summary();
}

/// How much there is.
struct Scale {
    files: &'static [usize],
    world_sizes: &'static [u32],
    served: &'static [usize],
}

impl Scale {
    const FULL: Self = Self {
        files: &[1_000, 10_000, 200_000],
        world_sizes: &[1, 64, 1_024],
        served: &[1_000, 100_000],
    };
    const TINY: Self = Self { files: &[10], world_sizes: &[1, 3], served: &[10] };
}

/// `cargo bench` measures; `cargo test --benches` and `cargo bench -- --test` run each case once.
fn is_measuring() -> bool {
    let is_given = |flag: &str| std::env::args().any(|argument| argument == flag);
    is_given("--bench") && !is_given("--test")
}

/// One rank's files, from the numbers alone.
fn measure_assign(criterion: &mut Criterion, scale: &Scale) {
    let spec = spec_of(0);
    let mut group = criterion.benchmark_group("assign");
    for &files in scale.files {
        group.throughput(Throughput::Elements(u64::try_from(files).unwrap()));
        for &world_size in scale.world_sizes {
            let name = BenchmarkId::new(format!("{files} files"), format!("{world_size} ranks"));
            let rank = world_size / 2;
            group.bench_function(name, |bencher| {
                bencher.iter(|| assign(&spec, files, 7, (rank, world_size)));
            });
            print_checked(&spec, files, world_size);
        }
    }
    group.finish();
}

/// Sees that the ranks share all files, and prints the checksum of the whole order.
fn print_checked(spec: &v1::DatasetSpec, files: usize, world_size: u32) {
    let order = assign(spec, files, 7, (0, 1));
    let stride = usize::try_from(world_size).unwrap();
    for rank in [0, world_size / 2, world_size - 1] {
        let share = assign(spec, files, 7, (rank, world_size));
        let start = usize::try_from(rank).unwrap();
        assert!(order.iter().skip(start).step_by(stride).eq(&share));
    }
    let bytes: Vec<u8> =
        order.iter().flat_map(|&place| u64::try_from(place).unwrap().to_le_bytes()).collect();
    let checksum = crc32c(&bytes);
    println!("assign, {files} files, {world_size} ranks: crc32c of the order {checksum:08x}");
}

fn spec_of(number: usize) -> v1::DatasetSpec {
    v1::DatasetSpec {
        name: format!("dataset-{number}"),
        path: "/data/training".into(),
        format: "parquet".into(),
        total_samples: 1_000_000_000,
        shard_size: 10_000,
        seed: 9,
        shuffle: true,
    }
}

/// A coordinator, and a connection to it.
struct Datasets {
    service: Service,
    channel: Channel,
}

impl Datasets {
    fn start() -> Self {
        let service = Service::start();
        let channel = service.runtime.block_on(service.endpoint.connect()).unwrap();
        Self { service, channel }
    }

    fn client(&self) -> DatasetsClient<Channel> {
        DatasetsClient::new(self.channel.clone())
            .max_encoding_message_size(FILES_BYTES_MAX)
            .max_decoding_message_size(FILES_BYTES_MAX)
    }

    /// Registers files in a job; gives how many the coordinator counted.
    fn register(&self, job: &str, number: usize, files: &[String]) -> u64 {
        let (job, spec) = (job.into(), Some(spec_of(number)));
        let request =
            v1::RegisterDatasetRequest { job, identity: None, spec, files: files.to_vec() };
        let mut client = self.client();
        let reply = self.service.runtime.block_on(client.register_dataset(request)).unwrap();
        reply.into_inner().file_count
    }

    fn share(&self, number: usize, place: (u32, u32)) -> Vec<String> {
        let (rank, world_size) = place;
        let (job, name) = ("bench".into(), spec_of(number).name);
        let request = v1::GetShardRequest { job, name, rank, world_size, epoch: 7 };
        let mut client = self.client();
        self.service.runtime.block_on(client.get_shard(request)).unwrap().into_inner().files
    }
}

/// Files as a large dataset has them.
fn names(count: usize) -> Vec<String> {
    (0..count).map(|index| format!("part-{:03}/shard-{index:06}.parquet", index / 1_000)).collect()
}

/// A registration and a rank's question, as a worker sees them.
fn measure_service(criterion: &mut Criterion, scale: &Scale) {
    let service = Datasets::start();
    let mut group = criterion.benchmark_group("service of datasets");
    group.sampling_mode(SamplingMode::Flat);
    let mut known = 0;
    for &count in scale.served {
        let files = names(count);
        let expected = u64::try_from(count).unwrap();
        group.throughput(Throughput::Elements(expected));
        // The same registration again: it is compared with the one that is kept.
        group.bench_function(BenchmarkId::new("register again", count), |bencher| {
            bencher.iter(|| assert_eq!(service.register("bench", count, &files), expected));
        });
        group.bench_function(BenchmarkId::new("register", count), |bencher| {
            bencher.iter(|| {
                known += 1;
                let job = format!("bench-{}", known / DATASETS_OF_A_JOB);
                assert_eq!(service.register(&job, known, &files), expected);
            });
        });
        service.register("bench", count, &files);
        for &world_size in scale.world_sizes {
            let function = format!("get_shard, {world_size} ranks");
            group.bench_function(BenchmarkId::new(function, count), |bencher| {
                bencher.iter(|| service.share(count, (world_size / 2, world_size)));
            });
        }
        let all = service.share(count, (0, 1));
        assert_eq!(all.len(), count);
        let checksum = crc32c(all.concat().as_bytes());
        println!("get_shard, {count} files: crc32c of all names {checksum:08x}");
    }
    group.finish();
}
