//! Measures how many acknowledged commits a second the embedded store makes, for `cargo xtask bench`:
//! `cargo run --release -p fleet-registry --example commits [DIRECTORY [CLIENTS [SECONDS]]]`.
//!
//! Each client commits units of 1 KiB one after the other, each under the condition that its key does
//! not exist, as the API does. Beside it stands the floor of the same file system: how many times a
//! second one thread can append 1 KiB and sync. The directory, the current one unless given, should be
//! on the disk the registry is to live on; what was written there is removed at the end.
use fleet_registry::{EmbeddedStore, Op, Store as _, Txn};
use std::{
    error::Error,
    fs::{self, File},
    io::{Seek as _, Write as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use tokio::task::JoinSet;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let under = PathBuf::from(arguments.next().unwrap_or_else(|| ".".into()));
    let clients: usize = arguments.next().map_or(Ok(16), |n| n.parse())?;
    let seconds: u64 = arguments.next().map_or(Ok(5), |n| n.parse())?;
    let directory = under.join(format!("commits-{}", std::process::id()));
    fs::create_dir(&directory)?;
    let result = measure(&directory, clients, Duration::from_secs(seconds));
    fs::remove_dir_all(&directory)?;
    result
}

fn measure(directory: &Path, clients: usize, time: Duration) -> Result<(), Box<dyn Error>> {
    let syncs = floor(&directory.join("floor"), time.min(Duration::from_secs(2)))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let (commits, mut waits) = runtime.block_on(commits(&directory.join("registry"), clients, time))?;
    waits.sort();
    let percentile = |p: usize| waits[(waits.len() - 1) * p / 100].as_secs_f64() * 1000.0;
    let (median, slow) = (percentile(50), percentile(99));
    println!(
        "{commits:.0} commits/s with {clients} clients (median {median:.2} ms, 99 % under {slow:.2} ms)"
    );
    println!("{syncs:.0} appends with sync/s by one thread; ratio {:.2}", commits / syncs);
    Ok(())
}

fn floor(path: &Path, time: Duration) -> std::io::Result<f64> {
    let (mut file, begin, mut count) = (File::create(path)?, Instant::now(), 0_u32);
    while begin.elapsed() < time {
        // On a fast disk it would get very large.
        if count.is_multiple_of(1024) {
            file.set_len(0)?;
            file.rewind()?;
        }
        file.write_all(&[0; 1024])?;
        file.sync_data()?;
        count += 1;
    }
    Ok(f64::from(count) / begin.elapsed().as_secs_f64())
}

async fn commits(
    directory: &Path,
    clients: usize,
    time: Duration,
) -> Result<(f64, Vec<Duration>), Box<dyn Error>> {
    let store = EmbeddedStore::open(directory)?;
    let begin = Instant::now();
    let mut tasks: JoinSet<Result<Vec<Duration>, fleet_registry::StoreError>> = (0..clients)
        .map(|client| {
            let store = store.clone();
            async move {
                let mut waits = Vec::new();
                while begin.elapsed() < time {
                    let key = format!("unit/{client}-{}.service", waits.len());
                    let start = Instant::now();
                    store.commit(Txn::of(Op::put(&*key, vec![b'x'; 1024])).when(key, 0)).await?;
                    waits.push(start.elapsed());
                }
                Ok(waits)
            }
        })
        .collect();
    let mut waits = Vec::new();
    while let Some(done) = tasks.join_next().await {
        waits.extend(done??);
    }
    let rate = waits.len() as f64 / begin.elapsed().as_secs_f64();
    store.close().await;
    Ok((rate, waits))
}
