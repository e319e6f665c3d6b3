// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"strconv"

	"github.com/baton-epp/baton/inference"
)

// moriio is vLLM's MoRIIOConnector (ROCm) in READ mode: serial, with a handle that decode reads blocks by, as with
// [nixlv2], whose legs and fallbacks it shares. Three things differ. A transfer has a name that the router gives it
// (transfer_id): the engine looks it up when it answers, and both engines know the transfer by it. The handle names a
// handshake and a notify port instead of remote_port and remote_request_id. And it is there only where the answer was
// cut off by its limit: one that stopped by itself has no handle in any version read, and is [Complete]. Several choices
// (n > 1) are kept away by Traits.OneChoice: the engine keeps one request for each transfer_id.
//
// WRITE mode, in which decode offers its blocks before prefill ran, is another wire and not spoken. Neither are
// forks that look for addresses in the request id.
type moriio struct{ nixlv2 }

func (moriio) Prefill(x *Exchange, body *inference.Edits) {
	oneTokenExactly(x.Request, body)
	x.Ticket = "tx" + newUUID()
	ask := askForBlocks[:len(askForBlocks)-1] + `,"transfer_id":` + strconv.Quote(x.Ticket) + `}`
	setTransfer(x.Request, []byte(ask), body)
}

func (moriio) Answer(x *Exchange, answer []byte) Answer {
	return handleForm{
		{"transfer_id", isText}, {"remote_handshake_port", isPort}, {"remote_notify_port", isPort},
	}.take(x, answer)
}
