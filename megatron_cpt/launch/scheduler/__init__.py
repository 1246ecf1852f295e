"""One job for every scheduler: model, script, site, and the commands that submit, ask and cancel."""
