// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"context"
	"encoding/json"
)

// wire is how the engines of one kind move KV blocks from a prefill to a decode leg. A process has one, made when it
// starts. Its methods are called without process.mu held and are safe for concurrent use.
type wire interface {
	// read looks at what a request's body says about the transfer and makes its part in it; nil for a plain request. What
	// a real engine refuses at once is an error.
	read(c *call, f *fields) (leg, *apiError)
	// stop forgets everything without freeing: the process has ended.
	stop()
}

// leg is one request's part in a transfer: the prefill leg or the decode leg. Exactly one of done and left is called.
type leg interface {
	// phase is phasePrefill or phaseTransfer, as fault rules and records name it.
	phase() string
	// load is called when the request has its blocks, before anything is computed: a decode leg waits for its blocks
	// and fills them. errLoadFailed follows the engine's load-failure policy, errClientGone when ctx ended. died names
	// why the engine process ends, "" for not at all.
	load(ctx context.Context, g *group) (died string, err error)
	// done is called after the last token, before the answer is written: a prefill leg takes over the blocks of g (it
	// sets their sequences' blocks to nil) or waits until they were fetched. member and value are put at the top level
	// of the answer; member "" is none.
	done(ctx context.Context, g *group) (member string, value json.RawMessage, err error)
	// left is called when the request ended otherwise: its client left, or it failed.
	left(g *group)
}
