// SPDX-License-Identifier: Apache-2.0

package metricsscraper

import (
	"bytes"
	"math"
	"slices"
	"strconv"

	"github.com/baton-epp/baton/pool"
)

// extractor turns readings into pool.Metrics. It belongs to one endpoint's loop and keeps what does not change.
type extractor struct {
	lora             [3][]byte // the lists behind maxLoRA, running and waiting
	maxLoRA          int
	running, waiting []string
}

// extract fills m from r. withCache is false when the page was not asked for cache information: that of last is kept.
func (x *extractor) extract(r *reading, m, last *pool.Metrics, withCache bool) {
	take := func(sig signal, has uint16, to *float64) {
		if r.n[sig] > 0 {
			m.Has |= has
			*to = r.sum[sig]
		}
	}
	take(sigWaiting, pool.HasWaiting, &m.Waiting)
	take(sigWaitingByReason, pool.HasWaitingByReason, &m.WaitingCapacity)
	take(sigRunning, pool.HasRunning, &m.Running)
	take(sigKVExpired, pool.HasKVExpired, &m.KVExpired)
	take(sigKVUsage, pool.HasKVCacheUsage, &m.KVCacheUsage)
	if n := r.n[sigKVUsage]; n > 1 {
		m.KVCacheUsage /= float64(n)
	}
	var blockSize, numBlocks float64
	take(sigBlockSize, pool.HasCacheConfig, &blockSize)
	take(sigNumBlocks, pool.HasCacheConfig, &numBlocks)
	m.BlockSize, m.NumBlocks = whole(blockSize), whole(numBlocks)
	if !withCache && r.n[sigBlockSize]+r.n[sigNumBlocks] == 0 {
		m.Has |= last.Has & pool.HasCacheConfig
		m.BlockSize, m.NumBlocks = last.BlockSize, last.NumBlocks
	}
	if r.n[sigSleep] > 0 {
		m.Has |= pool.HasSleep
		m.Sleeping = r.asleep && !r.awake
	}
	if r.n[sigLoRA] > 0 {
		m.Has |= pool.HasLoRA
		x.takeLoRA(r)
		m.MaxLoRA, m.RunningLoRA, m.WaitingLoRA = x.maxLoRA, x.running, x.waiting
	}
}

// takeLoRA splits the lists only when they changed. Published slices are never written again.
func (x *extractor) takeLoRA(r *reading) {
	if slices.EqualFunc(x.lora[:], r.lora[:], bytes.Equal) {
		return
	}
	for i := range r.lora {
		x.lora[i] = append(x.lora[i][:0], r.lora[i]...)
	}
	x.maxLoRA, _ = strconv.Atoi(string(x.lora[0]))
	x.running, x.waiting = adapters(x.lora[1]), adapters(x.lora[2])
}

// whole is v as an int, 0 when it is not one that fits.
func whole(v float64) int {
	if v < 0 || v > math.MaxInt32 {
		return 0
	}
	return int(v)
}
