//! Damaged files: refused, checked and repaired.
use super::*;
use std::collections::BTreeMap;

const RECORDS: usize = 499;
type Contents = BTreeMap<String, (Revision, Vec<u8>)>;

fn contents(snapshot: &Snapshot) -> Contents {
    snapshot.entries.iter().map(|e| (e.key.to_string(), (e.revision, e.value.to_vec()))).collect()
}

/// Opens and reads all, then lets go without leaving traces.
async fn read(directory: &Path) -> Result<(Contents, Revision), OpenError> {
    let store = EmbeddedStore::open(directory)?;
    let snapshot = store.range("").await.unwrap();
    store.close().await;
    Ok((contents(&snapshot), snapshot.revision))
}

/// A directory with these files, and nothing else.
fn lay_out(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(directory.path().join(name), bytes).unwrap();
    }
    directory
}

/// A registry as its three files: `crashed`, as a kill would leave it, else closed.
async fn image(crashed: bool) -> (Vec<u8>, Vec<u8>, Contents, Revision) {
    let directory = made().await;
    let path = directory.path();
    let store = EmbeddedStore::open(path).unwrap();
    // Leaves something in the file that is not valid any more
    for n in (0..RECORDS).step_by(7) {
        put(&store, &format!("unit/{n:03}"), &value_of(n)).await.unwrap();
    }
    store.commit(Txn::of(Op::put("unit/000", "last")).then(Op::delete("unit/001"))).await.unwrap();
    let snapshot = store.range("").await.unwrap();
    store.0.shared.back_up();
    if !crashed {
        store.close().await;
    }
    let file = fs::read(path.join("registry.redb")).unwrap();
    let backup = fs::read(path.join("registry.backup")).unwrap();
    store.close().await;
    (file, backup, contents(&snapshot), snapshot.revision)
}

/// Whatever byte is wrong: the registry is opened with all that was in it, or refused; and the repair
/// brings back all with the backup, and nothing that is not true without it.
async fn any_wrong_byte(crashed: bool) {
    let (file, backup, truth, revision) = image(crashed).await;
    let (mut refused, mut rolled_back, mut kept, mut restored) = (0, 0, 0, 0);
    let step = file.len() / 30;
    for offset in (0..64).step_by(9).chain((64..file.len()).step_by(step)) {
        let mut bytes = file.clone();
        // More than a byte beyond the header, so that it likely hits something
        let end = if offset < 64 { offset + 1 } else { (offset + 100).min(bytes.len()) };
        bytes[offset..end].iter_mut().for_each(|b| *b ^= 0x41);
        let whole =
            lay_out(&[("registry.redb", &bytes), ("registry.made", b"x"), ("registry.backup", &backup)]);
        let alone = lay_out(&[("registry.redb", &bytes), ("registry.made", b"x")]);
        let path = whole.path();
        match read(path).await {
            // After a crash redb can't tell a damaged page of the very last commit from one that was
            // not written yet, and so not acknowledged; it goes back by that one.
            Ok((mut found, _)) if crashed && found.contains_key("unit/001") => {
                found.remove("unit/001");
                assert_eq!(
                    found.insert("unit/000".into(), truth["unit/000"].clone()).unwrap().1,
                    value_of(0).as_bytes()
                );
                assert!(found == truth, "byte {offset}");
                rolled_back += 1;
            }
            Ok((found, _)) => assert!(found == truth, "byte {offset}"),
            Err(OpenError::Damaged { .. }) => {
                refused += 1;
                assert_eq!(fs::read(path.join("registry.backup")).unwrap(), backup);
                let report = check(path).unwrap();
                assert!(!report.is_sound(), "byte {offset}: {report}");
                assert_eq!(report.backup.map(|b| b.1), Some(RECORDS));

                let report = repair(path).unwrap();
                assert!(!report.was_sound);
                assert_eq!(report.kept + report.restored, RECORDS, "byte {offset}: {report}");
                assert_eq!(report.lost, [""; 0]);
                (kept, restored) = (kept + report.kept, restored + report.restored);
                assert_eq!(report.put_aside, Some(path.join("registry.redb.damaged-1")));
                let (found, now) = read(path).await.unwrap();
                assert!(found == truth, "byte {offset}: {report}");
                assert!(now > revision);
                assert!(repair(path).unwrap().was_sound);
                assert!(check(path).unwrap().is_sound());

                match repair(alone.path()) {
                    Ok(report) => {
                        let (found, now) = read(alone.path()).await.unwrap();
                        assert_eq!(found.len(), report.kept);
                        assert!(now > revision);
                        for (key, value) in &found {
                            assert_eq!(Some(value), truth.get(key), "byte {offset}: {key}");
                        }
                        let named = report.kept + report.lost.len();
                        assert!(named == RECORDS || report.incomplete, "byte {offset}: {report}");
                    }
                    Err(OpenError::Unrepairable { .. }) => {
                        assert!(alone.path().join("registry.redb").exists());
                    }
                    Err(e) => panic!("byte {offset}: {e}"),
                }
            }
            Err(e) => panic!("byte {offset}: {e}"),
        }
    }
    println!(
        "refused {refused}, gone back by one commit {rolled_back}; records kept {kept}, restored {restored}"
    );
    assert!(rolled_back <= 5, "{rolled_back} went back");
    assert!(refused > 10, "only {refused} were noticed");
    assert!(kept > restored, "kept {kept}, restored {restored}");
}

#[tokio::test]
async fn any_wrong_byte_of_a_closed_file() {
    any_wrong_byte(false).await;
}

#[tokio::test]
async fn any_wrong_byte_of_a_file_after_a_crash() {
    any_wrong_byte(true).await;
}

#[tokio::test]
async fn brings_back_only_what_the_file_can_not_tell() {
    let directory = made().await;
    let path = directory.path();
    let store = EmbeddedStore::open(path).unwrap();
    store.0.shared.back_up();
    let backup = fs::read(path.join("registry.backup")).unwrap();
    // Since the backup: one destroyed, one changed, one new
    let txn = Txn::of(Op::delete("unit/100")).then(Op::put("unit/200", "changed"));
    store.commit(txn.then(Op::put("unit/300.5", "new"))).await.unwrap();
    store.close().await;
    fs::write(path.join("registry.backup"), &backup).unwrap();

    let file = path.join("registry.redb");
    let mut bytes = fs::read(&file).unwrap();
    let text = value_of(400);
    let places: Vec<_> = (0..bytes.len()).filter(|i| bytes[*i..].starts_with(text.as_bytes())).collect();
    assert!(!places.is_empty());
    for place in places {
        bytes[place] ^= 1;
    }
    fs::write(&file, &bytes).unwrap();
    let refused = refusal(path);
    assert!(refused.contains("is damaged: ") && refused.contains("fleetd registry repair"), "{refused}");
    let checked = check(path).unwrap().to_string();
    assert!(checked.contains("the record \"unit/400\" has a wrong checksum"), "{checked}");
    let report = repair(path).unwrap();
    assert_eq!((report.kept, report.restored, report.lost.len()), (499, 1, 0), "{report}");
    assert!(!report.incomplete);
    let (found, _) = read(path).await.unwrap();
    let value = |key: &str| found.get(key).map(|(_, v)| String::from_utf8(v.clone()).unwrap());
    assert_eq!(value("unit/100"), None);
    assert_eq!(value("unit/200").as_deref(), Some("changed"));
    assert_eq!(value("unit/300.5").as_deref(), Some("new"));
    assert_eq!(value("unit/400"), Some(text));
    assert_eq!(fs::read(path.join("registry.redb.damaged-1")).unwrap(), bytes);
    assert_eq!(fs::read(path.join("registry.backup.before-repair-1")).unwrap(), backup);

    // Without the backup that record is lost, and said to be.
    let alone = lay_out(&[("registry.redb", &bytes)]);
    let report = repair(alone.path()).unwrap();
    assert_eq!((report.kept, report.restored, &*report.lost), (499, 0, &["unit/400".to_owned()][..]));
    assert!(report.to_string().contains("lost: \"unit/400\""), "{report}");
    assert!(read(alone.path()).await.unwrap().0.len() == 499);
}

#[tokio::test]
async fn restores_the_backup_when_nothing_else_is_left() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let store = EmbeddedStore::open(path).unwrap();
    let cluster = store.cluster().to_owned();
    let values: [&[u8]; 4] = [b"", b"text \"quoted\" \n", b"\xff\x00\x7f", "\u{1F6A2}".as_bytes()];
    for (n, value) in values.iter().enumerate() {
        store.commit(Txn::of(Op::put(format!("k{n}"), *value))).await.unwrap();
    }
    let lease = store.grant(Duration::from_secs(3600)).await.unwrap();
    let last = store.commit(Txn::of(Op::put_leased("leased", "", lease))).await.unwrap();
    let truth = contents(&store.range("k").await.unwrap());
    store.close().await;

    for lose in ["remove", "empty", "garble"] {
        let file = path.join("registry.redb");
        match lose {
            "remove" => fs::remove_file(&file).unwrap(),
            "empty" => fs::write(&file, "").unwrap(),
            _ => fs::write(&file, [0x55; 70_000]).unwrap(),
        }
        let report = repair(path).unwrap();
        assert_eq!((report.kept, report.restored), (0, 4), "{lose}: {report}");
        assert!(report.incomplete && report.backup_age.is_some());
        assert!(report.to_string().contains("4 restored from the backup, which is "), "{report}");
        assert_eq!(report.put_aside.is_some(), lose != "remove");
        let store = EmbeddedStore::open(path).unwrap();
        assert_eq!(store.cluster(), cluster);
        let snapshot = store.range("").await.unwrap();
        assert!(contents(&snapshot) == truth, "{lose}");
        assert!(snapshot.revision > last);
        store.close().await;
    }

    // Lines of the backup that are damaged are left out; a damaged first line makes it useless.
    let backup = fs::read_to_string(path.join("registry.backup")).unwrap();
    fs::write(path.join("registry.backup"), backup.replace("quoted", "quotes")).unwrap();
    fs::remove_file(path.join("registry.redb")).unwrap();
    let report = repair(path).unwrap();
    assert_eq!(report.restored, 3);
    fs::write(path.join("registry.backup"), backup.replacen("taken", "token", 1)).unwrap();
    fs::write(path.join("registry.redb"), [0x55; 70_000]).unwrap();
    let error = repair(path).unwrap_err();
    assert!(matches!(error, OpenError::Unrepairable { .. }), "{error}");
    assert!(error.to_string().contains("there is no backup; put back a copy"), "{error}");
    assert_eq!(fs::read(path.join("registry.redb")).unwrap(), [0x55; 70_000]);
}

#[tokio::test]
async fn backs_up_when_something_changed() {
    let directory = made().await;
    let backup = directory.path().join("registry.backup");
    let first = fs::read_to_string(&backup).unwrap();
    assert_eq!(first.lines().count(), 501);
    let store = EmbeddedStore::open(directory.path()).unwrap();
    // A restart alone changes nothing in it.
    store.0.shared.back_up();
    assert_eq!(fs::read_to_string(&backup).unwrap(), first);
    store.commit(Txn::of(Op::delete("unit/007"))).await.unwrap();
    store.close().await;
    let second = fs::read_to_string(&backup).unwrap();
    assert_eq!(second.lines().count(), 500);
    assert!(!second.contains("unit/007"));
}
