//! The tiles of a batch of feature maps.

use super::{GROUPS, POINTS, SIDE, TILES, TRANSFORMED};

/// How a batch of feature maps is cut into tiles.
pub(super) struct Tiling {
    pub(super) height: usize,
    pub(super) width: usize,
    /// Tiles of one image, down and across.
    pub(super) grid: [usize; 2],
    /// Tiles of the batch.
    pub(super) count: usize,
    /// Tiles of a full group.
    pub(super) group: usize,
    pub(super) lanes: usize,
}

impl Tiling {
    /// For `b` feature maps, vectors of `lanes` floats, and `group` tiles in registers at once.
    pub(super) fn new([b, height, width]: [usize; 3], [lanes, group]: [usize; 2]) -> Self {
        let grid = [height.div_ceil(SIDE), width.div_ceil(SIDE)];
        Self {
            height,
            width,
            grid,
            count: b * grid[0] * grid[1],
            group,
            lanes,
        }
    }

    /// Output channels of one task.
    pub(super) fn panel(&self) -> usize {
        2 * self.lanes
    }

    /// Tiles that share the transformed weights, in whole groups.
    pub(super) fn tiles_of_a_chunk(&self) -> usize {
        let chunks = self.count.div_ceil(TILES);
        self.count.div_ceil(chunks).next_multiple_of(self.group)
    }

    /// Tiles whose inputs of `c` channels are held at once, in whole chunks.
    pub(super) fn tiles_of_a_round(&self, c: usize) -> usize {
        let chunk = self.tiles_of_a_chunk();
        (TRANSFORMED / (POINTS * c * chunk)).max(1) * chunk
    }

    /// The rows of a group that holds this many tiles.
    pub(super) fn group_of(&self, tiles: usize) -> usize {
        let fits = GROUPS.into_iter().find(|&rows| rows >= tiles);
        fits.unwrap_or(self.group).min(self.group)
    }

    /// The image, and the row and column of the tile's first output.
    pub(super) fn place(&self, tile: usize) -> [usize; 3] {
        let [down, across] = self.grid;
        let (image, tile) = (tile / (down * across), tile % (down * across));
        [image, tile / across * SIDE, tile % across * SIDE]
    }
}
