// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// newUUID returns a random UUID (RFC 9562, version 4). Ids are names that engines match on: no client may guess them.
func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// The layout of a snowflake, from the highest bit: 0, 41 bits of milliseconds, 10 of the process, 12 of a counter.
const (
	snowflakeCounter = 12
	snowflakeProcess = 10
	// snowflakeEpoch is where the milliseconds begin; 41 bits of them last until 2093.
	snowflakeEpoch = 1_704_067_200_000 // 2024-01-01, Unix
	// snowflakeSoonest keeps ids at 2^42 and above, the range of ids that are not the engine's own, whatever the clock
	// says.
	snowflakeSoonest = 1 << (42 - snowflakeProcess - snowflakeCounter)
)

// lastSnowflake is time and counter of the id given out last; it is the process's, as the ids must differ whoever asks.
var lastSnowflake atomic.Int64

// snowflakeProcessID tells processes apart that share engines, such as two replicas of Baton: it is drawn by lot.
var snowflakeProcessID = sync.OnceValue(func() int64 {
	var b [2]byte
	_, _ = rand.Read(b[:]) // never fails
	return int64(binary.BigEndian.Uint16(b[:]) & (1<<snowflakeProcess - 1))
})

// newSnowflake returns a number that is larger than every one returned before, and fits 63 bits. Beyond 4,096 in one
// millisecond it borrows from the next. Safe for concurrent use.
func newSnowflake(now time.Time) int64 {
	ms := max(now.UnixMilli()-snowflakeEpoch, snowflakeSoonest)
	for {
		last := lastSnowflake.Load()
		next := max(ms<<snowflakeCounter, last+1)
		if lastSnowflake.CompareAndSwap(last, next) {
			ms, counter := next>>snowflakeCounter, next&(1<<snowflakeCounter-1)
			return ms<<(snowflakeProcess+snowflakeCounter) | snowflakeProcessID()<<snowflakeCounter | counter
		}
	}
}
