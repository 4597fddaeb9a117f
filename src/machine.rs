//! Available memory of the machine.

#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};

/// Mount point of control groups on Linux.
const GROUPS: &str = "sys/fs/cgroup";

/// Returns the number of bytes that this process can still take before the system ends it or another process: memory
/// that is free or can be freed, plus swap, within the limits of control groups. None where the system does not tell.
pub fn available() -> Option<usize> {
    available_at(Path::new("/"))
}

fn available_at(root: &Path) -> Option<usize> {
    let memory = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let bytes = |name| Some(field(&memory, name)?.saturating_mul(1 << 10));
    let free = bytes("MemAvailable:")?;
    let swap = bytes("SwapFree:").unwrap_or(0);
    let limits = groups(root).into_iter().filter_map(|group| left_in(&group, swap));
    Some(limits.fold(free.saturating_add(swap), usize::min))
}

/// Returns the number after `name` in lines of names and numbers.
fn field(text: &str, name: &str) -> Option<usize> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Returns the folders of the process's control groups, up to the outermost: groups of version 2, and version 1's
/// memory groups. In a container, the outermost group is the container's.
fn groups(root: &Path) -> Vec<PathBuf> {
    let own = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mut groups = Vec::new();
    for line in own.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let top = match controllers {
            "" => root.join(GROUPS),
            controllers if controllers.split(',').any(|name| name == "memory") => root.join(GROUPS).join("memory"),
            _ => continue,
        };
        let own = top.join(path.trim_start_matches('/'));
        groups.extend(own.ancestors().take_while(|group| group.starts_with(&top)).map(PathBuf::from));
    }
    groups
}

/// Bytes that a control group has left; None where it has no limit. Its file cache counts as free.
fn left_in(group: &Path, swap: usize) -> Option<usize> {
    let text = |name| fs::read_to_string(group.join(name)).ok();
    let number = |name| text(name)?.trim().parse::<usize>().ok();
    let stat = text("memory.stat").unwrap_or_default();
    let files = ["inactive_file ", "active_file "].iter().filter_map(|name| field(&stat, name)).sum();
    if let Some(most) = number("memory.max") {
        let swap = match number("memory.swap.max") {
            Some(most) => swap.min(most.saturating_sub(number("memory.swap.current").unwrap_or(0))),
            None => swap,
        };
        let used = number("memory.current")?.saturating_sub(files);
        return Some(most.saturating_sub(used).saturating_add(swap));
    }
    let used = number("memory.usage_in_bytes")?.saturating_sub(files);
    Some(number("memory.limit_in_bytes")?.saturating_sub(used).saturating_add(swap))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    /// A machine with 1,000 MiB available and 24 of swap, and these files.
    fn machine(files: &[(&str, &str)]) -> Option<usize> {
        let root = tempfile::tempdir().unwrap();
        let memory = ("proc/meminfo", "MemTotal: 9999999 kB\nMemAvailable:  1024000 kB\nSwapFree: 24576 kB\n");
        for (path, text) in [&[memory], files].concat() {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        available_at(root.path())
    }

    #[test]
    fn memory_that_can_be_freed_and_swap_are_available() {
        assert_eq!(machine(&[]), Some(1024 * MIB));
        assert_eq!(available_at(Path::new("/nowhere")), None);
    }

    #[test]
    fn the_tightest_of_the_groups_around_the_process_counts() {
        let group = |path: &'static str, max: &'static str| {
            [
                (path.to_owned() + "/memory.max", max.to_owned()),
                (path.to_owned() + "/memory.current", (200 * MIB).to_string()),
                (
                    path.to_owned() + "/memory.stat",
                    format!("anon 5\ninactive_file {}\nactive_file {}", 30 * MIB, 70 * MIB),
                ),
                (path.to_owned() + "/memory.swap.max", "0".into()),
            ]
        };
        let with = |outer: &'static str, inner: &'static str| {
            let files = [group("sys/fs/cgroup/a", outer), group("sys/fs/cgroup/a/b", inner)].concat();
            let mut files: Vec<_> = files.iter().map(|(path, text)| (&**path, &**text)).collect();
            files.push(("proc/self/cgroup", "0::/a/b\n"));
            machine(&files)
        };
        assert_eq!(with("max", "max"), Some(1024 * MIB));
        // limit 300 MiB; used: 200 MiB, less 100 MiB of file cache
        assert_eq!(with("max", "314572800"), Some(200 * MIB));
        assert_eq!(with("209715200", "314572800"), Some(100 * MIB));
        assert_eq!(with("1048576", "max"), Some(0));
    }

    #[test]
    fn groups_of_the_first_version_count_too() {
        let files = [
            ("proc/self/cgroup", "11:cpu,cpuacct:/x\n3:memory:/a\n"),
            ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "9223372036854771712"),
            ("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "1048576"),
            // a container shows its own group as the outermost
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "104857600"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "4194304"),
        ];
        assert_eq!(machine(&files), Some((100 - 4 + 24) * MIB));
    }
}
