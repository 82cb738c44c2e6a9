//! Layers between the host's directories and the jobs that see them.

use std::path::PathBuf;

use super::host_mounts::Mounts;
use super::rootfs::{Layer, Root};
use super::trials;
use crate::sandbox::host::Host;
use crate::sys::launch;

/// Puts layers between the host and the root, as far as the kernel has them here. What stays as it is on the host, and
/// can be locked and flushed by jobs: files and directories with mounts of their own, or inside.
pub(in crate::sandbox) fn add(root: &mut Root, host: &Host) -> Vec<PathBuf> {
    let mounts = Mounts::of_this_process();
    let sources: Vec<PathBuf> = root.entries.iter().filter_map(|(path, entry)| entry.source(path)).collect();
    let mut layers: Vec<Layer> = Vec::new();
    for layer in sources.iter().filter_map(|source| mounts.layer_for(source)) {
        if !layers.contains(&layer) {
            layers.push(layer);
        }
    }
    let works = |layers: &[Layer]| launch::can(0, trials::layers(host, layers).bytes());
    if !works(&layers) {
        layers.retain(|layer| works(std::slice::from_ref(layer)));
    }
    root.layers = layers;
    let layered = |source: &&PathBuf| !root.layers.iter().any(|layer| source.starts_with(&layer.directory));
    sources.iter().filter(layered).cloned().collect()
}
