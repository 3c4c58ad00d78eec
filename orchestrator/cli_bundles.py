def chat(): 
    """."""
def predict(): 
    """."""
