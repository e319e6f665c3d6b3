// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"math"
	"sync/atomic"
	"time"
)

const (
	// MinPaceTokens is the smallest prefill that tells something of an endpoint's speed: in a shorter one the fixed costs
	// of a request outweigh the computing.
	MinPaceTokens = 256

	// What is beyond these is no measurement of an engine: no context is as long, no GPU as fast, no held phase as slow.
	maxPaceTokens = 16 << 20
	maxPaceRate   = 1e7 // tokens per second
	maxPaceTook   = 10 * time.Minute

	rateRise     = 0.25             // share by which one faster prefill raises the speed
	rateRiseMost = 2                // one prefill counts as this many times the speed at most: its tokens may have been cached
	rateHalfLife = 5 * time.Minute  // slower prefills lower the speed by time, not by number: a burst that queues is no slow engine
	queueShare   = 0.2              // share of one prefill in the wait, at least
	queueFade    = 10 * time.Second // the wait is half of itself after this time without a prefill
	moveShare    = 0.1              // share of one transfer in the time per token, at least
	moveHalfLife = time.Minute
	moveMost     = 4 // one transfer counts as this many times its prediction at most: a handshake is paid once per pair
)

// Pace is what requests have shown about how fast an endpoint computes and hands over prompts. Nothing is asked of the
// endpoint: the times are those of requests that ran anyway. Safe for concurrent use, without locks; of two updates made
// at once one may be lost. The zero value knows nothing.
//
// A prefill takes queue + uncached / speed. One time cannot tell the two apart, so the speed is the upper edge of
// uncached / took (it rises fast and falls by time) and the wait is what the other prefills took beyond it. A transfer
// takes fixed + perToken · tokens, where fixed is the lower edge of what transfers took.
type Pace struct {
	speed    aged // tokens per second
	queue    aged // seconds
	fixed    aged // seconds
	perToken aged // seconds
}

// Prefilled notes that a prefill of uncached prompt tokens was answered after took, its wait in the queue included.
func (p *Pace) Prefilled(uncached int64, took time.Duration) { p.prefilled(uncached, took, time.Now()) }

func (p *Pace) prefilled(uncached int64, took time.Duration, now time.Time) {
	if uncached < 0 || uncached > maxPaceTokens || took <= 0 {
		return
	}
	seconds, tokens := min(took, maxPaceTook).Seconds(), float64(uncached)
	if uncached >= MinPaceTokens {
		seen := min(tokens/seconds, maxPaceRate)
		p.speed.change(now, func(old float64, age time.Duration) float64 {
			if seen > old {
				return old + rateRise*(min(seen, rateRiseMost*old)-old)
			}
			return old + passed(age, rateHalfLife)*(seen-old)
		}, seen)
	}
	speed := p.TokensPerSecond()
	if speed == 0 {
		return
	}
	wait := max(0, seconds-tokens/speed)
	p.queue.change(now, func(old float64, age time.Duration) float64 {
		return old + max(queueShare, passed(age, queueFade))*(wait-old)
	}, wait)
}

// Received notes that a decode endpoint sent its first event took after it was given a prompt of tokens whose KV blocks
// it had to fetch.
func (p *Pace) Received(tokens int64, took time.Duration) { p.received(tokens, took, time.Now()) }

func (p *Pace) received(tokens int64, took time.Duration, now time.Time) {
	if tokens <= 0 || tokens > maxPaceTokens || took <= 0 {
		return
	}
	seconds, n := min(took, maxPaceTook).Seconds(), float64(tokens)
	if expected := p.Transfer(tokens); expected > 0 {
		seconds = min(seconds, moveMost*expected.Seconds())
	}
	_, each := p.perToken.load()
	p.fixed.change(now, func(old float64, age time.Duration) float64 {
		if seconds < old {
			return seconds
		}
		return old + passed(age, rateHalfLife)*max(0, seconds-each*n-old)
	}, seconds)
	_, fixed := p.fixed.load()
	excess := max(0, seconds-fixed) / n
	p.perToken.change(now, func(old float64, age time.Duration) float64 {
		return old + max(moveShare, passed(age, moveHalfLife))*(excess-old)
	}, excess)
}

// TokensPerSecond is the learned prefill speed, prompt tokens that no cache holds per second; 0 while nothing is known.
func (p *Pace) TokensPerSecond() float64 {
	_, v := p.speed.load()
	return v
}

// Queue is the learned wait before a prefill begins, as far as it may still be believed at now: it fades while no
// prefill is seen. 0 while nothing is known.
func (p *Pace) Queue(now time.Time) time.Duration {
	at, v := p.queue.load()
	if v == 0 {
		return 0
	}
	return duration(v * (1 - passed(since(at, now), queueFade)))
}

// Transfer is the learned time to fetch the blocks of a prompt of tokens and to say the first byte; 0 while nothing is
// known.
func (p *Pace) Transfer(tokens int64) time.Duration {
	_, fixed := p.fixed.load()
	if fixed == 0 {
		return 0
	}
	_, each := p.perToken.load()
	return duration(fixed + each*float64(max(0, min(tokens, maxPaceTokens))))
}

// aged is a number ≥ 0 and when it was set, in one word, so that no reader sees one without the other: a float32 and, in
// the upper half, the time in ticks. 0 = never set.
type aged struct{ word atomic.Uint64 }

// tick is the resolution of an aged number's time, which wraps after eight years.
const tick = 64 * time.Millisecond

func (a *aged) load() (at uint32, v float64) {
	w := a.word.Load()
	return uint32(w >> 32), float64(math.Float32frombits(uint32(w))) //nolint:gosec // the two halves of the word
}

// change sets the number to what next makes of it, to first where there is none yet. A result that is not a number from
// 0 on leaves it as it is.
func (a *aged) change(now time.Time, next func(old float64, age time.Duration) float64, first float64) {
	for range 4 { // then the update is lost, of which there are enough at such a rate
		old, v := a.word.Load(), first
		if old != 0 {
			v = next(float64(math.Float32frombits(uint32(old))), since(uint32(old>>32), now)) //nolint:gosec // as in load
		}
		f := float32(v)
		if !(f >= 0 && f <= math.MaxFloat32) { // also true for NaN
			return
		}
		if a.word.CompareAndSwap(old, uint64(ticks(now))<<32|uint64(math.Float32bits(f))) {
			return
		}
	}
}

func ticks(now time.Time) uint32 {
	return max(1, uint32(now.UnixMilli()/tick.Milliseconds())) //nolint:gosec // wraps on purpose
}

// since is the age of a number; none for one from the future, whatever the clock did.
func since(at uint32, now time.Time) time.Duration {
	return time.Duration(max(0, int32(ticks(now)-at))) * tick //nolint:gosec // a difference of wrapped numbers
}

// passed is the share of a number that is gone after age, from 0 to 1.
func passed(age, halfLife time.Duration) float64 {
	if age <= 0 {
		return 0
	}
	return 1 - math.Exp2(-float64(age)/float64(halfLife))
}

func duration(seconds float64) time.Duration {
	return time.Duration(min(seconds, math.MaxInt32) * float64(time.Second))
}
